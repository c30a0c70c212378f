"""ONNX Runtime sessions, the inputs that they run on, and the machine."""
