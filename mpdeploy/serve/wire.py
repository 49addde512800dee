"""What the server says of itself and of its models, as the protocol's JSON."""

from __future__ import annotations

from typing import Any

from mpdeploy.artifact import TensorSpec
from mpdeploy.environment import package_version
from mpdeploy.serve.dtypes import datatype_of
from mpdeploy.serve.messages import ModelMetadata
from mpdeploy.serve.version import Version

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")


def server_json() -> dict[str, Any]:
    """The server's metadata."""
    return {"name": "mpdeploy", "version": package_version("mpdeploy") or "", "extensions": list(EXTENSIONS)}


def metadata_json(metadata: ModelMetadata) -> dict[str, Any]:
    """A model's metadata; what mpdeploy knows of its engine and verdict is under `parameters`."""
    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": [_tensor(spec) for spec in metadata.inputs],
        "outputs": [_tensor(spec) for spec in metadata.outputs],
        "parameters": dict(metadata.notes),
    }


def config_json(version: Version) -> dict[str, Any]:
    """A model's configuration, as far as Triton's names go."""
    contract, options = version.contract, version.options
    batch = contract.max_batch if contract.batched else 0
    return {
        "name": version.name,
        "platform": version.metadata.platform,
        "backend": str(version.metadata.notes["engine"]),
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": batch,
        "input": [_configured(item.spec, batch) for item in contract.inputs],
        "output": [_configured(spec, batch) for spec in contract.outputs],
        "instance_group": [{"name": version.name, "count": options.instances}],
        "dynamic_batching": {
            "preferred_batch_size": list(contract.pad_to),
            "max_queue_delay_microseconds": int(options.delay_ms * 1000),
            "default_queue_policy": {
                "max_queue_size": options.max_queue,
                "default_timeout_microseconds": int(options.deadline_s * 1e6),
                "allow_timeout_override": True,
            },
        },
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": _shape(spec)}


def _shape(spec: TensorSpec) -> list[int]:
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape or ()]


def _configured(spec: TensorSpec, batch: int) -> dict[str, Any]:
    datatype = datatype_of(spec.dtype)
    return {
        "name": spec.name,
        "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
        "dims": _shape(spec)[1:] if batch else _shape(spec),
    }
