"""One small onnx_ir pass a file. `mpdeploy.precision.rewrite` lists them in the order they run."""
