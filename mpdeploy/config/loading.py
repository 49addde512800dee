"""A pipeline file is run, and what its `pipeline()` returns is checked."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from mpdeploy.config.pipeline import Pipeline
from mpdeploy.errors import ConfigError, closest_names


def load_pipeline(path: Path) -> Pipeline:
    """Run a pipeline file and return what its `pipeline()` returns.

    Raises:
        ConfigError: no such file, no `pipeline()` in it, or it does not return a valid Pipeline.
        UserCodeError: the file raised; the message holds its own traceback.
    """
    from mpdeploy.user_code import import_file, user_call

    if not path.is_file():
        near = [str(file) for file in sorted(path.parent.glob("*.py"))] if path.parent.is_dir() else []
        raise ConfigError(
            f"There is no pipeline file {path}.",
            hint=f"closest files: {closest_names(str(path), near)}" if near else "mpdeploy init NAME writes one",
        )
    module = import_file(path)
    function = getattr(module, "pipeline", None)
    if not callable(function):
        raise ConfigError(
            f"{path} defines no function 'pipeline'.",
            hint="end it with: def pipeline() -> Pipeline: return Pipeline(...)",
        )
    try:
        result = user_call(function)
    except ValidationError as error:
        faults = "\n".join(
            f"  {'.'.join(map(str, item['loc'])) or '(whole)'}: {item['msg']}" for item in error.errors()
        )
        raise ConfigError(f"{path}: {error.title} does not validate:\n{faults}") from error
    if not isinstance(result, Pipeline):
        raise ConfigError(f"{path}: pipeline() returned {type(result).__name__}, expected mpdeploy.config.Pipeline.")
    return result
