"""Asking TensorRT's own ONNX parser whether it takes a file: strong typing is checked there, without building anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpdeploy.engines.tensorrt.build import parse_message
from mpdeploy.engines.tensorrt.library import RTX_FAMILY, import_library, library_problem
from mpdeploy.engines.tensorrt.log import collected_lines


def rtx_refusal(path: Path) -> str | None:
    """Why TensorRT-RTX's parser refuses a model, naming its nodes; None where it takes it, or is not installed."""
    if library_problem(RTX_FAMILY) is not None:
        return None
    trt = import_library(RTX_FAMILY)
    # The library tells a logger that is written in Python of every step, 8 times a node, which takes most of a parse's time: it is
    # asked for words only once there is something to say.
    if _takes(trt, trt.Logger(trt.Logger.INTERNAL_ERROR), path, lambda parser: None) is None:
        return None
    with collected_lines(trt) as (logger, lines):
        return _takes(trt, logger, path, lambda parser: parse_message(parser, lines, RTX_FAMILY, path))


def _takes(trt: Any, logger: Any, path: Path, explain: Callable[[Any], str | None]) -> str | None:
    """None where the parser takes the file, else what `explain` makes of the parser, or an empty text."""
    builder = trt.Builder(logger)  # the parser does not keep the builder and the network alive: these names do
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    return None if parser.parse_from_file(str(path)) else explain(parser) or ""
