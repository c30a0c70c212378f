"""ONNX graphs: read, written, folded."""
