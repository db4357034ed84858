"""The ONNX adapter."""
