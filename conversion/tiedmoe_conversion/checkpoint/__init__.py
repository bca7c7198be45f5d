"""A checkpoint on disk: its headers and tensors read, its quantised weights dequantised, its weight files written."""
