"""What is read from a model's graph without running it: files, parameters, FLOPs."""
