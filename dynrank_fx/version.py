"""The version of the package, which ONNX files carry in their metadata."""

__version__ = "0.1.0"
