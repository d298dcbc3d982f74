"""A trained detector for other runtimes: as one graph of ONNX's standard operators, and run by onnxruntime."""
