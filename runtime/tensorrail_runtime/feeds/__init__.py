"""Inputs for models, from files or arrays: rules, sources, batches and sequences."""
