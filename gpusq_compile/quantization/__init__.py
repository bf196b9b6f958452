"""Symmetric fake quantization with learned scales, its calibration, and the integer operators."""
