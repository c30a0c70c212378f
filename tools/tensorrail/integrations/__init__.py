"""Tensorrail inside other libraries: ADMM for `transformers` and `lightning`, `compress` as a pass of `olive`."""
