"""An InferenceService holds keys that KServe knows and nothing else: by our own table, by its CRD and by its Python models."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaged import judged_run, model

from mpdeploy.errors import ConfigError, UsageError
from mpdeploy.serve.package import PackageRequest, package
from mpdeploy.serve.package.kserve import KServeOptions, check_service, read_yaml, service_name, service_of

CRD = "MPDEPLOY_KSERVE_CRD"
PYTHON = "MPDEPLOY_KSERVE_PYTHON"
OWN = {"runtime": "mpdeploy", "image": "registry.example/team/mpdeploy:0.1"}
RUNTIMES: tuple[dict[str, Any], ...] = ({}, OWN)


def service(folder: Path, engine: str = "tensorrt", **options: Any) -> dict[str, Any]:
    made = KServeOptions(storage_uri="s3://bucket/digits", **options)
    return service_of("digits_cnn", [model(folder, engine)], made, asked=True, allow_failed=False)


@pytest.mark.parametrize("options", RUNTIMES, ids=["triton", "mpdeploy"])
def test_a_service_passes_its_own_check(tmp_path, options):
    values = service(tmp_path, **options)
    check_service(values)
    predictor = values["spec"]["predictor"]
    container = predictor["model"] if "model" in predictor else predictor["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert values["metadata"]["name"] == "digits-cnn"


def test_a_model_for_a_cpu_asks_for_no_gpu(tmp_path):
    assert "nvidia.com/gpu" not in str(service(tmp_path, "onnx"))


def test_our_server_is_told_which_engine_was_asked_for(tmp_path):
    container = service(tmp_path, **OWN)["spec"]["predictor"]["containers"][0]
    assert container["args"][-2:] == ["--engine", "tensorrt"]
    assert {"name": "STORAGE_URI", "value": "s3://bucket/digits"} in container["env"]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda values: values["spec"]["predictor"].update(minReplica=1), "spec.predictor.minReplica: there is no such key"),
        (lambda values: values["spec"]["predictor"].update(maxReplicas="4"), "maxReplicas is '4', not a int"),
        (lambda values: values["spec"]["predictor"].update(maxReplicas=0), "minReplicas is above maxReplicas"),
        (lambda values: values["spec"]["predictor"]["model"].update(storageURI="s3://b"), "storageURI: there is no such key"),
        (lambda values: values["spec"]["predictor"].pop("model"), "both or neither"),
        (lambda values: values["spec"]["predictor"].update(scaleMetric="rps"), "HPA knows cpu and memory"),
        (lambda values: values["spec"]["predictor"]["model"]["resources"]["limits"].update(memory="much"), "is 'much'"),
        (lambda values: values["metadata"].update(name="Digits_CNN"), "metadata.name"),
        (lambda values: values.update(apiVersion="serving.kserve.io/v1"), "serving.kserve.io/v1 "),
    ],
)  # fmt: skip
def test_a_key_or_value_that_kserve_does_not_have_is_caught(tmp_path, change, fault):
    values = copy.deepcopy(service(tmp_path))
    change(values)
    with pytest.raises(ConfigError) as caught:
        check_service(values)
    assert fault in caught.value.message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--storage-uri"),
        ({"storage_uri": "/mnt/models"}, "nothing KServe can read"),
        ({"storage_uri": "s3://b", "runtime": "mpdeploy"}, "needs --image"),
        ({"storage_uri": "s3://b", "image": "x"}, "--runtime mpdeploy"),
        ({"storage_uri": "s3://b", "runtime": "tf"}, "no such runtime"),
        ({"storage_uri": "s3://b", "min_replicas": 5}, "not in order"),
        ({"storage_uri": "s3://b", "min_replicas": 0}, "scale to zero"),
    ],
)
def test_options_that_make_no_service_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        KServeOptions(**options)


@pytest.mark.parametrize(
    ("name", "found"), [("digits_cnn", "digits-cnn"), ("Bert.Base", "bert-base"), ("a" * 80, "a" * 63)]
)
def test_a_name_becomes_one_that_kubernetes_takes(name, found):
    assert service_name(name) == found


def test_a_name_without_a_letter_in_front_is_refused():
    with pytest.raises(UsageError, match="cannot name"):
        service_name("3d_net")


@pytest.mark.parametrize("options", RUNTIMES, ids=["triton", "mpdeploy"])
def test_a_package_holds_the_service_and_what_it_mounts(tmp_path, options):
    run = judged_run(tmp_path / "run")
    given = {"storage_uri": "pvc://models/tiny", "max_replicas": 2, **options}
    made = package(PackageRequest(run, "kserve", tmp_path / "out", name="tiny", options=given))
    values = read_yaml(tmp_path / "out/inference_service.yaml")
    assert values["spec"]["predictor"]["maxReplicas"] == 2
    for item in made.provenance["models"].values():
        assert (tmp_path / "out" / item["path"]).exists()
    assert (tmp_path / "out/model" / ("run.json" if options else "tiny/config.pbtxt")).is_file()


# -- KServe's own words, where they are at hand ------------------------------------------------------------------------


def unknown_keys(value: Any, schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Keys and types that an OpenAPI schema does not have; nothing is pruned in silence."""
    if schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string"):
        return
    if "properties" in schema:
        for key, item in value.items():
            if key not in schema["properties"]:
                yield f"{where}.{key}"
            else:
                yield from unknown_keys(item, schema["properties"][key], f"{where}.{key}")
    elif "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        for key, item in value.items():
            yield from unknown_keys(item, schema["additionalProperties"], f"{where}.{key}")
    elif schema.get("type") == "array":
        for index, item in enumerate(value):
            yield from unknown_keys(item, schema["items"], f"{where}[{index}]")
    else:
        kinds = {"string": str, "integer": int, "boolean": bool, "object": dict}
        if type(value) is not kinds[schema["type"]]:
            yield f"{where} is a {type(value).__name__}, the schema wants a {schema['type']}"


@pytest.mark.slow
@pytest.mark.skipif(
    CRD not in os.environ, reason=f"{CRD} does not name KServe's CRD serving.kserve.io_inferenceservices.yaml"
)
@pytest.mark.parametrize("options", RUNTIMES, ids=["triton", "mpdeploy"])
def test_every_key_is_in_kserves_crd(tmp_path, options):
    import yaml

    crd = yaml.load(Path(os.environ[CRD]).read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [item for item in crd["spec"]["versions"] if item["name"] == "v1beta1"]
    schema = version["schema"]["openAPIV3Schema"]
    values = {key: value for key, value in service(tmp_path, **options).items() if key != "metadata"}
    assert list(unknown_keys(values, schema)) == []
    values["spec"]["predictor"]["minReplica"] = 1
    assert list(unknown_keys(values, schema)) == [".spec.predictor.minReplica"], "the check itself can fail"


@pytest.mark.slow
@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} does not name the Python of an environment with kserve")
@pytest.mark.parametrize("options", RUNTIMES, ids=["triton", "mpdeploy"])
def test_every_key_is_in_kserves_python_models(tmp_path, options):
    import json

    (tmp_path / "service.json").write_text(json.dumps(service(tmp_path, **options)))
    process = subprocess.run(
        [os.environ[PYTHON], "-c", KSERVE_CHECK, tmp_path / "service.json"], capture_output=True, text=True, check=False
    )
    assert process.stdout.split() == ["no-such-key:spec.predictor.minReplica"], process.stdout + process.stderr


KSERVE_CHECK = """
import json, sys
import kserve
import kubernetes.client.models as kubernetes_models

def walk(value, kind, where):
    if kind.lower().startswith("list["):
        for item in value:
            walk(item, kind[5:-1], where)
        return
    if kind.lower().startswith("dict") or kind in ("str", "int", "bool", "object", "ResourceQuantity"):
        return
    cls = getattr(kserve, kind, None) or getattr(kubernetes_models, kind, None)
    if cls is None:
        print("no-such-model:" + kind)
        return
    fields = {external: cls.openapi_types[internal] for internal, external in cls.attribute_map.items()}
    for key, item in value.items():
        if key not in fields:
            print("no-such-key:" + where + "." + key)
        else:
            walk(item, fields[key], where + "." + key)

service = json.load(open(sys.argv[1]))
walk(service["spec"], "V1beta1InferenceServiceSpec", "spec")
service["spec"]["predictor"]["minReplica"] = 1  # the check itself can fail
walk(service["spec"], "V1beta1InferenceServiceSpec", "spec")
"""
