"""Ray Serve's configuration as plain values, and a strict check: Ray's own schema takes keys that do not exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpdeploy.errors import ConfigError, UsageError
from mpdeploy.serve.package.models import PackagedModel
from mpdeploy.serve.package.ray_application import ARGUMENTS, DEPLOYMENT

IMPORT_PATH = "application:build"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the configuration says beside the model."""

    min_replicas: int = 1
    max_replicas: int = 4
    max_queue_size: int = 1024
    """Requests that may wait in a replica; more are refused with 503."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise UsageError(f"--min-replicas {self.min_replicas} --max-replicas {self.max_replicas}: not in order.")
        if self.max_queue_size < 1:
            raise UsageError(f"--queue-size {self.max_queue_size}: at least one request must be let in.")


def config_of(
    name: str, models: Sequence[PackagedModel], options: RayOptions, *, asked: bool, allow_failed: bool
) -> dict[str, Any]:
    """The configuration that serves `models`.

    Args:
        name: of the model and of the application.
        models: best first.
        options: see `RayOptions`.
        asked: whether the user named one engine, so that no other may be taken.
        allow_failed: whether what failed is served.
    """
    batch = max(1, max(model.batching.max_batch for model in models))
    on_gpu = any(model.engine.startswith("tensorrt") for model in models)
    arguments: dict[str, Any] = {"name": name, "max_queue": options.max_queue_size}
    if asked:
        arguments["engine"] = models[0].engine
    if allow_failed:
        arguments["allow_failed"] = True
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},  # noqa: S104
        "applications": [
            {
                "name": name,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": arguments,
                "deployments": [
                    {
                        "name": DEPLOYMENT,
                        # two batches: one that runs, one that fills meanwhile
                        "max_ongoing_requests": max(16, 2 * batch),
                        "autoscaling_config": {
                            "min_replicas": options.min_replicas,
                            "max_replicas": options.max_replicas,
                            "target_ongoing_requests": batch,
                        },
                        "ray_actor_options": {"num_cpus": 1} | ({"num_gpus": 1} if on_gpu else {}),
                        "graceful_shutdown_timeout_s": 40,
                        "health_check_period_s": 10,
                    }
                ],
            }
        ],
    }


KEYS: Mapping[str, frozenset[str]] = {
    "": frozenset({"proxy_location", "http_options", "applications"}),
    "http_options": frozenset({"host", "port"}),
    "applications": frozenset({"name", "route_prefix", "import_path", "runtime_env", "args", "deployments"}),
    "applications.args": frozenset(ARGUMENTS) - {"run"},
    "applications.deployments": frozenset(
        {
            "name", "max_ongoing_requests", "autoscaling_config", "ray_actor_options", "graceful_shutdown_timeout_s",
            "health_check_period_s",
        }
    ),
    "applications.deployments.autoscaling_config": frozenset({"min_replicas", "max_replicas", "target_ongoing_requests"}),
    "applications.deployments.ray_actor_options": frozenset({"num_cpus", "num_gpus"}),
}  # fmt: skip
"""Path -> the keys that may stand there."""


def check_config(values: Mapping[str, Any], *, max_batch: int) -> None:
    """Refuse a configuration with a key that Ray Serve does not have, or numbers that contradict each other.

    Raises:
        ConfigError: all faults at once.
    """
    faults = list(_unknown(values, ""))
    for application in values.get("applications", []):
        for deployment in application.get("deployments", []):
            scaling = deployment.get("autoscaling_config", {})
            if scaling.get("min_replicas", 1) > scaling.get("max_replicas", 1):
                faults.append("autoscaling_config: min_replicas is above max_replicas")
            ongoing = deployment.get("max_ongoing_requests", 0)
            if ongoing < max_batch:
                faults.append(f"max_ongoing_requests is {ongoing}: a batch of {max_batch} could never fill")
            if scaling.get("target_ongoing_requests", 1) > ongoing:
                faults.append("autoscaling_config: target_ongoing_requests is above max_ongoing_requests")
            if deployment.get("name") != DEPLOYMENT:
                faults.append(f"the deployment is '{deployment.get('name')}', the application's is '{DEPLOYMENT}'")
    if faults:
        raise ConfigError("The Serve configuration does not fit:\n" + "\n".join(f"  {fault}" for fault in faults))
    _check_with_ray(values)


def _unknown(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _unknown(item, path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in KEYS.get(path, frozenset()):
                yield f"{path}.{key}".lstrip(".") + ": there is no such key"
            else:
                yield from _unknown(item, f"{path}.{key}".lstrip("."))


def _check_with_ray(values: Mapping[str, Any]) -> None:
    """Ray's own schema too, where Ray is installed."""
    try:
        from ray.serve.schema import ServeDeploySchema
    except ImportError:
        return
    try:
        ServeDeploySchema(**values)
    except ValueError as error:  # pydantic's ValidationError is one
        raise ConfigError(f"Ray's ServeDeploySchema does not take the configuration: {error}") from error
