"""Reading, writing, folding and tapping ONNX graphs."""
