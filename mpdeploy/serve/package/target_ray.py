"""`--target ray`: an application, its configuration, and the run that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpdeploy.files import write_text
from mpdeploy.run_dir import RunDir
from mpdeploy.serve.package import PackageRequest, options_for
from mpdeploy.serve.package.kserve import read_yaml, yaml_text
from mpdeploy.serve.package.provenance import provenance_of
from mpdeploy.serve.package.ray_config import RayOptions, check_config, config_of
from mpdeploy.serve.package.run_copy import copy_run
from mpdeploy.serve.package.target_kserve import MODEL, engines_listed, models_for_our_server

CONFIG, APPLICATION = "serve_config.yaml", "application.py"
SOURCE = '''"""The Serve application: the run beside this file, served by mpdeploy's own server inside each replica."""

from pathlib import Path

from mpdeploy.serve.package.ray_application import build as build_application


def build(args):
    """Ray calls this with `args` of serve_config.yaml."""
    return build_application({"run": str(Path(__file__).parent / "model"), **args})
'''


def write(request: PackageRequest, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Write the package into `folder`; see `package`."""
    options = options_for(RayOptions, request.target, dict(request.options))
    run = RunDir.open(request.run)
    chosen, name = models_for_our_server(run, request)
    copy_run(run, folder / MODEL, chosen.models)
    config = config_of(name, chosen.models, options, asked=len(request.engines) == 1, allow_failed=request.allow_failed)
    write_text(
        folder / CONFIG, yaml_text(config, "serve run serve_config.yaml, from this folder; every node needs mpdeploy")
    )
    write_text(folder / APPLICATION, SOURCE)
    write_text(folder / "README.md", _readme(name, options))
    check_config(read_yaml(folder / CONFIG), max_batch=max(model.batching.max_batch for model in chosen.models))
    provenance = provenance_of(
        run, request.target, chosen, engines_listed(run, chosen.models), allow_failed=request.allow_failed,
        checks={"ray_keys": "strict", "ray_schema": _ray_version()},
    )  # fmt: skip
    return provenance, [f"cd {request.output} && serve run {CONFIG}"]


def _ray_version() -> str:
    from mpdeploy.environment import package_version

    return f"read by ray {found}" if (found := package_version("ray")) else "not installed"


def _readme(name: str, options: RayOptions) -> str:
    return f"""# A Ray Serve application

On one machine, from this folder, with `ray[serve]` and `mpdeploy[serve,cpu]` installed:

    serve run {CONFIG}

On a cluster, whose nodes have mpdeploy installed, put a zip of this folder where they can read it, name it as
`runtime_env: {{working_dir: URI}}` of the application in `{CONFIG}`, and:

    serve deploy {CONFIG}

Ask it: `POST /v2/models/{name}/infer`, as any server of the Open Inference Protocol. It scales from {options.min_replicas} to
{options.max_replicas} replicas by requests in flight. `package.json` says which run it was made from and what its gates said.
"""
