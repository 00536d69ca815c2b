"""The one Python file that every published ONNX package contains."""
