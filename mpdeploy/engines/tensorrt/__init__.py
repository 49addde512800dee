"""TensorRT and TensorRT-RTX: one code path in which the library's module is a parameter.

    library.py   the two libraries (`Family`), how they are imported, and which options each has
    driver.py    the NVIDIA driver and GPU, asked before any library is touched
    log.py       the library's one logger, and Ctrl-C while native code runs
    options.py   every build option, validated where it is declared
    header.py    the first bytes of a plan, and whether a plan fits this machine
    build.py     ONNX file -> `engine.plan` + `engine.json`
    audit.py     precision per layer: of the parsed network, or from the engine inspector
    load.py      a plan -> the library's engine, where it fits this machine
    session.py   the engine at work: context, buffers, CUDA graph
    runner.py    the `Runner` that callers see
    backend.py   the rows of the engine table

Importing this package imports neither library, nor torch.
"""

from mpdeploy.engines.tensorrt.backend import TENSORRT, TENSORRT_RTX, TensorRTBackend
from mpdeploy.engines.tensorrt.build import Progress
from mpdeploy.engines.tensorrt.header import PlanHeader, read_header
from mpdeploy.engines.tensorrt.options import TensorRTOptions

__all__ = ["TENSORRT", "TENSORRT_RTX", "PlanHeader", "Progress", "TensorRTBackend", "TensorRTOptions", "read_header"]
