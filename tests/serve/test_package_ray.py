"""A Ray Serve package: its configuration holds keys that Ray knows, and where Ray is at hand it runs and answers."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaged import model
from served import checksum_model, decode_answer, make_run

import mpdeploy
from mpdeploy.errors import ConfigError, UsageError
from mpdeploy.serve.options import ServerOptions
from mpdeploy.serve.package import PackageRequest, package
from mpdeploy.serve.package.kserve import read_yaml
from mpdeploy.serve.package.ray_application import RunApplication, server_options
from mpdeploy.serve.package.ray_config import RayOptions, check_config, config_of
from mpdeploy.serve.protocol import encode_request

PYTHON = "MPDEPLOY_RAY_PYTHON"
"""The Python of an environment with ray[serve] and what mpdeploy[serve,cpu] needs."""


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "run", checksum_model(), name="sums")


def config(folder: Path, engine: str = "tensorrt") -> dict[str, Any]:
    return config_of("sums", [model(folder, engine)], RayOptions(), asked=True, allow_failed=False)


def test_a_configuration_passes_its_own_check(tmp_path):
    values = config(tmp_path)
    check_config(values, max_batch=32)
    (deployment,) = values["applications"][0]["deployments"]
    assert deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert deployment["max_ongoing_requests"] == 64, "one batch runs while the next one fills"
    assert "num_gpus" not in str(config(tmp_path, "onnxruntime"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda v: v["applications"][0].update(route_prefx="/"), "applications.route_prefx: there is no such key"),
        (lambda v: v["applications"][0]["args"].update(enginee="x"), "applications.args.enginee: there is no such key"),
        (lambda v: scaling(v).update(max_replica=9), "autoscaling_config.max_replica: there is no such key"),
        (lambda v: scaling(v).update(min_replicas=9), "min_replicas is above max_replicas"),
        (lambda v: scaling(v).update(target_ongoing_requests=99), "target_ongoing_requests is above"),
        (lambda v: deployment_of(v).update(max_ongoing_requests=8), "a batch of 32 could never fill"),
        (lambda v: deployment_of(v).update(name="Modl"), "the deployment is 'Modl'"),
    ],
)  # fmt: skip
def test_a_key_or_number_that_does_not_fit_is_caught(tmp_path, change, fault):
    values = copy.deepcopy(config(tmp_path))
    change(values)
    with pytest.raises(ConfigError) as caught:
        check_config(values, max_batch=32)
    assert fault in caught.value.message


def deployment_of(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values["applications"][0]["deployments"][0]
    return found


def scaling(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = deployment_of(values)["autoscaling_config"]
    return found


@pytest.mark.parametrize(
    "options", [{"min_replicas": 3, "max_replicas": 2}, {"max_replicas": 0, "min_replicas": 0}, {"max_queue_size": 0}]
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(UsageError):
        RayOptions(**options)


def test_arguments_of_the_application_are_checked():
    assert server_options({"run": "model", "name": "m", "max_queue": 7}).model.max_queue == 7
    with pytest.raises(UsageError, match="'queue' is no argument"):
        server_options({"run": "model", "queue": 7})
    with pytest.raises(UsageError, match="'run' is missing"):
        server_options({})


def test_the_package_holds_the_application_the_configuration_and_the_run(small_run, tmp_path):
    made = package(PackageRequest(small_run, "ray", tmp_path / "out", options={"max_replicas": 2}))
    assert read_yaml(tmp_path / "out/serve_config.yaml")["applications"][0]["args"]["name"] == "sums"
    compile((tmp_path / "out/application.py").read_text(), "application.py", "exec")
    (path,) = [item["path"] for item in made.provenance["models"].values()]
    assert (tmp_path / "out" / path).is_file()


# -- the application, without Ray: any ASGI server can run it ----------------------------------------------------------


async def lives(run: Path, x: np.ndarray[Any, Any]) -> tuple[list[str], int, dict[str, np.ndarray[Any, Any]]]:
    """Begin the application's lifespan, ask it once, end it."""
    import asyncio

    application = RunApplication(ServerOptions(run))
    told: list[str] = []
    ends = asyncio.Event()
    started = asyncio.Event()
    orders = iter(["lifespan.startup", "lifespan.shutdown"])

    async def order() -> dict[str, str]:
        kind = next(orders)
        if kind.endswith("shutdown"):
            await ends.wait()
        return {"type": kind}

    async def tell(message: dict[str, str]) -> None:
        told.append(message["type"])
        started.set()

    life = asyncio.ensure_future(application({"type": "lifespan"}, order, tell))
    await started.wait()
    assert application.ready
    body, headers = encode_request({"x": x})
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if sent:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v2/models/sums/infer", "raw_path": b"/v2/models/sums/infer",
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
    }  # fmt: skip
    await application(scope, receive, send)
    ends.set()
    await life
    got = {key.decode().lower(): value.decode() for key, value in sent[0]["headers"]}
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return told, sent[0]["status"], decode_answer(content, got.get("inference-header-content-length"))


def test_the_application_loads_with_its_lifespan_answers_and_drains(small_run):
    import asyncio

    x = np.arange(32, dtype=np.float32).reshape(2, 16)
    told, status, answer = asyncio.run(lives(small_run, x))
    assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert status == 200
    np.testing.assert_array_equal(answer["y"], 2 * x)


# -- on Ray ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    PYTHON not in os.environ, reason=f"{PYTHON} does not name the Python of an environment with ray[serve]"
)
def test_the_package_runs_on_ray_and_answers(small_run, tmp_path):
    python = Path(os.environ[PYTHON])
    package(PackageRequest(small_run, "ray", tmp_path / "out", name="sums"))
    path = tmp_path / "out/serve_config.yaml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path.write_text(path.read_text().replace("port: 8000", f"port: {port}").replace("0.0.0.0", "127.0.0.1"))
    house = str(Path(mpdeploy.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": house, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment["RAY_raylet_start_wait_time_s"] = "180"  # a busy machine takes longer than Ray's 30 s
    schema = (
        "import sys, yaml; from ray.serve.schema import ServeDeploySchema as S; S(**yaml.safe_load(open(sys.argv[1])))"
    )
    subprocess.run([python, "-c", schema, path], env=environment, check=True, timeout=120)
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(
        [python.with_name("serve"), "run", path.name], cwd=path.parent, env=environment, stdout=output, stderr=output
    ) as process:  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}/v2"
            end = time.monotonic() + 240
            while not ready(f"{url}/health/ready"):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(1)
            x = np.arange(32, dtype=np.float32).reshape(2, 16)
            body, headers = encode_request({"x": x})
            request = urllib.request.Request(f"{url}/models/sums/infer", body, headers)
            with urllib.request.urlopen(request, timeout=30) as response:
                answer = decode_answer(response.read(), response.headers["inference-header-content-length"])
            np.testing.assert_array_equal(answer["total"], x.sum(axis=1))
            with urllib.request.urlopen(f"{url}/models/sums", timeout=30) as response:
                assert json.load(response)["parameters"]["verdict"] == "pass"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
