"""Cores fitted to activations: ONNX graphs run in torch."""
