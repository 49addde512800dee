"""Export: FP32 master weights become an ONNX model that is checked against torch, and training's ranges become tensors'."""
