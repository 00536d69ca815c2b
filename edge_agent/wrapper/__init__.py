"""The one Python file that every published ONNX package contains: from messages to tokens, and to text that ends."""
