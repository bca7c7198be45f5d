"""The source on calibration text: which tokens, what its experts are given, and what a conversion cost."""
