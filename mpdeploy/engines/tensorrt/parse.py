"""Asking TensorRT's own ONNX parser whether it takes a file: strong typing is checked there, without building anything."""

from __future__ import annotations

from pathlib import Path

from mpdeploy.engines.tensorrt.build import parse_message
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, import_library, library_problem
from mpdeploy.engines.tensorrt.log import collected_lines


def rtx_refusal(path: Path) -> str | None:
    """Why TensorRT-RTX's parser refuses a model, naming its nodes; None where it takes it, or is not installed."""
    if library_problem(RTX_FAMILY) is not None:
        return None
    trt = import_library(RTX_FAMILY)
    with collected_lines(trt) as (logger, lines):
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if parser.parse_from_file(str(path)):
            return None
        return parse_message(parser, lines, RTX_FAMILY, path)
