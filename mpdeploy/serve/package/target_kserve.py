"""`--target kserve`: an InferenceService, and the folder that its storage URI must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpdeploy.engines import ENGINES
from mpdeploy.files import write_text
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.package import PackageRequest, options_for
from mpdeploy.serve.package.check import check_repository
from mpdeploy.serve.package.choose import Chosen, judge_of, models_of
from mpdeploy.serve.package.kserve import (
    KServeOptions,
    check_service,
    read_yaml,
    service_of,
    yaml_text,
)
from mpdeploy.serve.package.models import PackagedModel
from mpdeploy.serve.package.provenance import provenance_of
from mpdeploy.serve.package.run_copy import copy_run
from mpdeploy.serve.package.target_triton import repository_of
from mpdeploy.serve.package.triton import TritonOptions, check_model_name

SERVICE = "inference_service.yaml"
MODEL = "model"


def write(request: PackageRequest, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the package into `folder`; see `package`."""
    options = options_for(KServeOptions, request.target, dict(request.options))
    run = RunDir.open(request.run)
    home = folder / MODEL
    checks: dict[str, Any]
    if options.runtime == "triton":
        home.mkdir()
        chosen, names = repository_of(run, request, home, TritonOptions())
        name = next(iter(names))
        checks = check_repository(home, names)
        listed = {each: model.provenance() | {"path": f"{MODEL}/{each}"} for each, model in names.items()}
    else:
        chosen, name = models_for_our_server(run, request)
        copy_run(run, home, chosen.models)
        checks = {}
        listed = engines_listed(run, chosen.models)
    service = service_of(
        name, chosen.models, options, asked=len(request.engines) == 1, allow_failed=request.allow_failed
    )
    write_text(
        folder / SERVICE, yaml_text(service, f"Put the folder '{MODEL}' at {options.storage_uri}, then apply this.")
    )
    check_service(read_yaml(folder / SERVICE))
    write_text(folder / "README.md", _readme(options, name))
    provenance = provenance_of(
        run,
        request.target,
        chosen,
        listed,
        allow_failed=request.allow_failed,
        checks=checks | {"kserve_keys": "strict"},
    )
    return provenance, [
        f"put {request.output / MODEL} at {options.storage_uri}",
        f"kubectl apply -f {request.output / SERVICE}",
    ]


def models_for_our_server(run: RunDir, request: PackageRequest) -> tuple[Chosen, str]:
    """The engines of a run that our own server may be given, the measured fastest first, and the model's name."""
    name = check_model_name(request.name or str(run.manifest.get("pipeline") or run.path.resolve().name))
    fastest = run.manifest.get("chosen_engine")
    rows = sorted(ENGINES, key=lambda row: row != fastest)
    judge = judge_of(run, allow_failed=request.allow_failed)
    return models_of(run, judge, rows=rows, asked=request.engines, allow_failed=request.allow_failed), name


def engines_listed(run: RunDir, models: tuple[PackagedModel, ...]) -> dict[str, Any]:
    """Engine -> what it is, for `package.json`."""
    return {
        model.engine: model.provenance() | {"path": f"{MODEL}/{model.path.relative_to(run.path)}"} for model in models
    }


def _readme(options: KServeOptions, name: str) -> str:
    what = (
        "a model repository, run by KServe's own runtime `kserve-tritonserver`"
        if options.runtime == "triton"
        else f"a run directory, served by `mpdeploy serve` in `{options.image}`"
    )
    return f"""# An InferenceService for KServe 0.16 and later

1. Put the folder `{MODEL}` ({what}) at `{options.storage_uri}`.
2. `kubectl apply -f {SERVICE}`
3. Ask it: `POST /v2/models/{name}/infer`, as any server of the Open Inference Protocol.

It scales from {options.min_replicas} to {options.max_replicas} replicas by CPU use (Standard mode, Kubernetes' HPA). `package.json` says which
run it was made from and what its gates said.
"""
