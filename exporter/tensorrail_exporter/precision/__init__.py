"""fp16 and int8 copies of a model."""
