"""Conversion of a model to fp16 or int8, and the measurement of the result."""
