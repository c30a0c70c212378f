"""ONNX Runtime sessions, inputs for them, and a description of the machine."""
