"""Every name of the libraries that the code uses, held against 10.16, 11.4 and TensorRT-RTX 1.7.

`test_tensorrt_api.json` holds all members of the classes below, as the bindings of those versions define them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import mpdeploy.engines.tensorrt as package
from mpdeploy.engines.tensorrt import TENSORRT_RTX
from mpdeploy.engines.tensorrt.audit import PRECISION_FROM_DATATYPE
from mpdeploy.engines.tensorrt.build import DTYPE_FROM_DATATYPE
from mpdeploy.engines.tensorrt.library import import_library
from mpdeploy.engines.tensorrt.options import HARDWARE_LEVELS

TABLE = json.loads((Path(__file__).parent / "test_tensorrt_api.json").read_text())
SOURCES = sorted(Path(package.__file__).parent.glob("*.py"))

USED = {
    "Builder": ["create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"],
    "BuilderFlag": ["TF32", "SPARSE_WEIGHTS", "VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "WEIGHT_STREAMING"],
    "DataType": sorted(PRECISION_FROM_DATATYPE),
    "EngineInspector": ["execution_context", "get_engine_information"],
    "HardwareCompatibilityLevel": [level.upper() for level in HARDWARE_LEVELS],
    "IBuilderConfig": [
        "set_flag",
        "clear_flag",
        "get_flag",
        "builder_optimization_level",
        "set_memory_pool_limit",
        "profiling_verbosity",
        "hardware_compatibility_level",
        "add_optimization_profile",
        "create_timing_cache",
        "set_timing_cache",
        "get_timing_cache",
        "progress_monitor",
    ],
    "ICudaEngine": [
        "create_engine_inspector",
        "create_execution_context",
        "create_runtime_config",
        "device_memory_size_v2",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "get_weight_streaming_automatic_budget",
        "num_io_tensors",
        "num_optimization_profiles",
        "weight_streaming_budget_v2",
    ],
    "IExecutionContext": [
        "active_optimization_profile",
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_output_allocator",
        "set_tensor_address",
    ],
    "ILayer": ["get_input", "get_output", "metadata", "name", "num_inputs", "num_outputs", "type"],
    "ILogger": [],
    "INetworkDefinition": [
        "get_flag",
        "get_input",
        "get_layer",
        "get_output",
        "num_inputs",
        "num_layers",
        "num_outputs",
    ],
    "IOptimizationProfile": ["set_shape"],
    "IOutputAllocator": [],
    "IProgressMonitor": ["phase_start", "step_complete", "phase_finish"],
    "ITensor": ["dtype", "get_dimension_name", "is_network_input", "is_shape_tensor", "name", "shape"],
    "ITimingCache": ["serialize"],
    "Logger": [],
    "LayerInformationFormat": ["JSON"],
    "LayerType": ["CAST", "CONSTANT", "MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse_from_file"],
    "OnnxParserRefitter": ["refit_from_file"],
    "ParserError": ["desc", "file", "func", "line", "node", "node_name", "node_operator"],
    "ProfilingVerbosity": ["DETAILED"],
    "Refitter": ["refit_cuda_engine"],
    "Runtime": ["deserialize_cuda_engine", "engine_host_code_allowed"],
    "TensorIOMode": ["INPUT"],
    "TensorLocation": ["HOST"],
}
USED_OF_RTX_ONLY = {
    "BuilderFlag": ["REQUIRE_USER_ALLOCATION"],
    "ComputeCapability": ["SM75", "SM80", "SM86", "SM89", "SM120"],
    "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
    "EngineInvalidityDiagnostics": ["UNSUPPORTED_CC"],
    "EngineValidity": ["INVALID"],
    "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"],
    "IExecutionContext": ["is_stream_capturable"],
    "IRuntimeConfig": ["dynamic_shapes_kernel_specialization_strategy"],
    "Runtime": ["get_engine_validity"],
}
RTX = next(version for version in TABLE if version.startswith("rtx"))
# Attributes of our own objects that bear a member's name.
OWN = {"engine", "precision"}


@pytest.mark.parametrize("version", TABLE)
def test_every_used_name_is_there(version):
    missing = [f"{kind}.{name}" for kind, names in USED.items() for name in names if name not in TABLE[version][kind]]
    assert missing == []
    assert all(kind in TABLE[version] for kind in USED)


def test_the_names_of_rtx_only_are_there_and_nowhere_else():
    for kind, names in USED_OF_RTX_ONLY.items():
        for name in names:
            assert [version for version in TABLE if name in TABLE[version].get(kind, [])] == [RTX], f"{kind}.{name}"


def test_the_lists_above_hold_every_name_that_the_source_uses():
    known = {name for table in (USED, USED_OF_RTX_ONLY) for names in table.values() for name in names} | OWN
    members = {name for version in TABLE.values() for names in version.values() for name in names}
    kinds = set(USED) | set(USED_OF_RTX_ONLY)
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            assert node.attr not in members - known, f"{source.name}:{node.lineno} uses .{node.attr}"
            if isinstance(node.value, ast.Name) and node.value.id == "trt" and not node.attr.startswith("__"):
                assert node.attr in kinds, f"{source.name}:{node.lineno} uses trt.{node.attr}"


def test_the_lists_above_hold_no_name_that_the_source_does_not_use():
    text = "\n".join(source.read_text() for source in SOURCES)
    for table in (USED, USED_OF_RTX_ONLY):
        for kind, names in table.items():
            if kind in ("HardwareCompatibilityLevel", "ComputeCapability", "EngineInvalidityDiagnostics", "DataType"):
                continue  # reached by the name that a user or the library gives
            assert [name for name in names if name not in text] == [], kind


def test_every_type_of_a_tensor_is_known_by_name():
    for version in TABLE:
        assert sorted(PRECISION_FROM_DATATYPE) == TABLE[version]["DataType"]
    assert set(DTYPE_FROM_DATATYPE) <= set(PRECISION_FROM_DATATYPE)


@pytest.mark.skipif(TENSORRT_RTX.available() is not None, reason="TensorRT-RTX is not installed")
def test_the_installed_rtx_bindings_have_every_used_name():
    trt = import_library(TENSORRT_RTX.family)
    for table in (USED, USED_OF_RTX_ONLY):
        for kind, names in table.items():
            missing = [name for name in names if not hasattr(getattr(trt, kind), name)]
            # The bindings describe these for Python classes that override them, and define no attribute.
            assert missing == [] or kind == "IProgressMonitor", kind
    assert hasattr(trt.ILogger.Severity, "INTERNAL_ERROR")
