"""The proof that two graphs are equal, with its own algebra and its own readers of ONNX and torch."""
