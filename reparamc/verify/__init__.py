"""The commands `verify` and `audit`: ONNX models that anybody fused."""
