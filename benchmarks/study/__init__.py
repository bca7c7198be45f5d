"""The parts of `benchmarks/conversion_study.py`."""
