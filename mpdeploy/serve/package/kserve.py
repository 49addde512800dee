"""A KServe InferenceService (serving.kserve.io/v1beta1), as plain values, and a strict check of them.

KServe's own admission drops unknown keys in silence where a cluster prunes them, so a typo there deploys something else than was
meant. Here every key is looked up in a table of what is written.

Sources: https://kserve.github.io/website/docs/reference/crd-api and KServe's CRD, which a test reads where it is given one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.errors import ConfigError, MissingExtraError, UsageError
from mpdeploy.serve.package.models import PackagedModel

API_VERSION, KIND = "serving.kserve.io/v1beta1", "InferenceService"
MOUNT = "/mnt/models"
PORT = 8080
RUNTIMES = ("triton", "mpdeploy")
SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
STORAGE_URI = re.compile(r"(gs|s3|pvc|file|https?|hdfs|webhdfs|oci|oci\+native|oci\+fetch|hf)://\S+")
IMAGE = re.compile(r"[a-z0-9]([a-z0-9._/:@-]|\w)*")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class KServeOptions:
    """What the service says beside the model."""

    storage_uri: str = ""
    """Where the package's `model` folder was put: pvc://CLAIM/PATH, s3://BUCKET/PATH, ..."""
    runtime: str = "triton"
    """`triton` (KServe's own runtime kserve-tritonserver) or `mpdeploy` (our server in a container)."""
    image: str | None = None
    """The container of our server; wanted with `mpdeploy` alone."""
    namespace: str | None = None
    min_replicas: int = 1
    max_replicas: int = 4
    scale_on_cpu_percent: int = 70
    """The mean CPU use that replicas are added above (Kubernetes' HPA)."""
    timeout_s: int = 60

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise UsageError(
                f"--runtime {self.runtime}: there is no such runtime.", hint=f"one of {', '.join(RUNTIMES)}"
            )
        if not STORAGE_URI.fullmatch(self.storage_uri):
            raise UsageError(
                f"--storage-uri '{self.storage_uri}' is nothing KServe can read a model from.",
                hint="where you will put the package's folder `model`: --storage-uri pvc://CLAIM/PATH, or s3://, gs://, hf://, oci://",
            )
        if self.runtime == "mpdeploy" and not (self.image and IMAGE.fullmatch(self.image)):
            raise UsageError(
                "--runtime mpdeploy needs --image, the container that our server is in.",
                hint="examples/serving holds a Dockerfile; --image REGISTRY/NAME:TAG",
            )
        if self.runtime == "triton" and self.image:
            raise UsageError("--image is for --runtime mpdeploy; KServe brings its own Triton.")
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise UsageError(f"--min-replicas {self.min_replicas} --max-replicas {self.max_replicas}: not in order.")
        if self.min_replicas == 0:
            raise UsageError(
                "--min-replicas 0: Kubernetes' HPA does not scale to zero.", hint="1 is the least in the Standard mode"
            )


def service_name(model: str) -> str:
    """A model's name as Kubernetes takes it: lower case, letters, digits and '-'.

    Raises:
        UsageError: nothing of it can be a name there.
    """
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:63].rstrip("-")
    if not SERVICE_NAME.fullmatch(name):
        raise UsageError(f"'{model}' cannot name a Kubernetes service.", hint="--name with a letter in front")
    return name


def service_of(
    name: str, models: Sequence[PackagedModel], options: KServeOptions, *, asked: bool, allow_failed: bool
) -> dict[str, Any]:
    """The InferenceService that serves `models`.

    Args:
        name: of the model.
        models: best first.
        options: see `KServeOptions`.
        asked: whether the user named one engine, so that our server must not take another.
        allow_failed: whether our server must be told to serve what failed.
    """
    metadata: dict[str, Any] = {"name": service_name(name)}
    if options.namespace:
        metadata["namespace"] = options.namespace
    metadata["annotations"] = {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "hpa",
        "mpdeploy/model": name,
        "mpdeploy/engines": ",".join(model.engine for model in models),
        "mpdeploy/verdict": ",".join(model.verdict for model in models),
        "mpdeploy/sha256": ",".join(model.sha256 for model in models),
    }
    predictor: dict[str, Any] = {
        "minReplicas": options.min_replicas,
        "maxReplicas": options.max_replicas,
        "scaleMetric": "cpu",
        "scaleTarget": options.scale_on_cpu_percent,
        "timeout": options.timeout_s,
    }
    on_gpu = any(model.engine.startswith("tensorrt") for model in models)
    container = {"resources": _resources(models, on_gpu=on_gpu)} | _probes()
    if options.runtime == "triton":
        predictor["model"] = {
            "modelFormat": {"name": "triton"},
            "protocolVersion": "v2",
            "runtime": "kserve-tritonserver",
            "storageUri": options.storage_uri,
            "args": ["--disable-auto-complete-config"],  # added to the runtime's own
        } | container
    else:
        arguments = ["serve", MOUNT, "--host", "0.0.0.0", "--port", str(PORT), "--name", name]  # noqa: S104
        arguments += ["--engine", models[0].engine] if asked else []
        arguments += ["--allow-failed"] if allow_failed else []
        predictor["containers"] = [
            {
                "name": "kserve-container",
                "image": options.image,
                "command": ["mpdeploy"],
                "args": arguments,
                "env": [{"name": "STORAGE_URI", "value": options.storage_uri}],
                "ports": [{"containerPort": PORT, "protocol": "TCP"}],
            }
            | container
        ]
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": {"predictor": predictor}}


def _resources(models: Sequence[PackagedModel], *, on_gpu: bool) -> dict[str, Any]:
    bytes_of_files = sum(model.path.stat().st_size for model in models)
    memory = f"{1024 + 4 * -(-bytes_of_files // _MIB)}Mi"  # weights, their copy while loading, and room for batches
    asked = {"cpu": "1", "memory": memory}
    gpu = {"nvidia.com/gpu": "1"} if on_gpu else {}
    return {"requests": asked | gpu, "limits": {"cpu": "4", "memory": memory} | gpu}


def _probes() -> dict[str, Any]:
    def probe(path: str, **more: int) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": PORT}, "timeoutSeconds": 5} | more

    return {
        "startupProbe": probe("/v2/health/ready", periodSeconds=5, failureThreshold=120),
        "readinessProbe": probe("/v2/health/ready", periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe("/v2/health/live", periodSeconds=10, failureThreshold=6),
    }


# -- check -------------------------------------------------------------------------------------------------------------

_CONTAINER = {
    "resources": {"requests": "quantities", "limits": "quantities"},
    "startupProbe": "probe",
    "readinessProbe": "probe",
    "livenessProbe": "probe",
    "args": [str],
}
_PROBE = {"httpGet": {"path": str, "port": int}, "timeoutSeconds": int, "periodSeconds": int, "failureThreshold": int}
SHAPE: Mapping[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "namespace": str, "annotations": "texts"},
    "spec": {
        "predictor": {
            "minReplicas": int,
            "maxReplicas": int,
            "scaleMetric": str,
            "scaleTarget": int,
            "timeout": int,
            "model": {
                "modelFormat": {"name": str},
                "protocolVersion": str,
                "runtime": str,
                "storageUri": str,
                **_CONTAINER,
            },
            "containers": [
                {
                    "name": str,
                    "image": str,
                    "command": [str],
                    "env": [{"name": str, "value": str}],
                    "ports": [{"containerPort": int, "protocol": str}],
                    **_CONTAINER,
                }
            ],
        }
    },
}
"""Every key that may stand in a service, with the type of its value."""


def check_service(values: Mapping[str, Any]) -> None:
    """Refuse a service with a key or a value that KServe does not have.

    Raises:
        ConfigError: all faults at once.
    """
    faults = list(_faults(values, SHAPE, ""))
    if not faults:  # only then is everything of the type that it must have
        faults = list(_meaning_faults(values))
    if faults:
        raise ConfigError("The InferenceService does not fit KServe:\n" + "\n".join(f"  {fault}" for fault in faults))


def _meaning_faults(values: Mapping[str, Any]) -> Iterator[str]:
    predictor = values.get("spec", {}).get("predictor", {})
    if (values.get("apiVersion"), values.get("kind")) != (API_VERSION, KIND):
        yield (f"it is {values.get('apiVersion')} {values.get('kind')}, not {API_VERSION} {KIND}")
    if not SERVICE_NAME.fullmatch(str(values.get("metadata", {}).get("name"))):
        yield (f"metadata.name is '{values.get('metadata', {}).get('name')}'")
    if ("model" in predictor) == ("containers" in predictor):
        yield ("spec.predictor holds both or neither of 'model' and 'containers'")
    if predictor.get("minReplicas", 1) > predictor.get("maxReplicas", 1):
        yield ("spec.predictor.minReplicas is above maxReplicas")
    if predictor.get("scaleMetric") not in ("cpu", "memory"):
        yield (f"spec.predictor.scaleMetric is '{predictor.get('scaleMetric')}'; HPA knows cpu and memory")


def _faults(value: Any, shape: Any, where: str) -> Iterator[str]:
    if shape == "probe":
        shape = _PROBE
    if shape in ("texts", "quantities"):
        if not isinstance(value, Mapping):
            yield f"{where} is no mapping"
            return
        for key, item in value.items():
            if not isinstance(item, str) or (shape == "quantities" and not _QUANTITY.fullmatch(item)):
                yield f"{where}.{key} is {item!r}"
    elif isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            yield f"{where} is no mapping"
            return
        for key, item in value.items():
            inner = f"{where}.{key}".lstrip(".")
            if key not in shape:
                yield f"{inner}: there is no such key"
            else:
                yield from _faults(item, shape[key], inner)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{where} is no list, or an empty one"
            return
        for index, item in enumerate(value):
            yield from _faults(item, shape[0], f"{where}[{index}]")
    elif type(value) is not shape:
        yield f"{where} is {value!r}, not a {shape.__name__}"


def yaml_text(values: Mapping[str, Any], *comments: str) -> str:
    """Values as YAML, in their order, with comment lines in front.

    Raises:
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError.for_extra("PyYAML", "serve") from error
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"# {line}\n" for line in comments) + text


def read_yaml(path: Path) -> Any:
    """What a YAML file holds."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))
