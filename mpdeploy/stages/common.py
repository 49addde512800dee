"""What several stages need: the user's splits, digests of folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpdeploy.artifact import Golden, OnnxModel
from mpdeploy.config import Pipeline
from mpdeploy.engines.base import Profile, default_profile
from mpdeploy.errors import ConfigError
from mpdeploy.files import digest_of_json
from mpdeploy.pipeline import Context
from mpdeploy.user_code import user_call

if TYPE_CHECKING:
    from mpdeploy.train.splits import Splits


def load_splits(pipeline: Pipeline) -> Splits:
    """Call the pipeline's data function.

    Raises:
        UserCodeError: it raised.
        ConfigError: it returned something else than Splits.
    """
    from mpdeploy.train.splits import Splits

    found = user_call(pipeline.data.load, pipeline.data)
    if not isinstance(found, Splits):
        raise ConfigError(f"data.load returned {type(found).__name__}, expected mpdeploy.train.splits.Splits.")
    return found


def profile_of(context: Context, model: OnnxModel) -> Profile:
    """The shapes an engine is built for: the configured batches, and other symbolic axes as long as the golden samples."""
    config, shapes = context.pipeline.build, {}
    if any(not isinstance(axis, int) for spec in model.inputs for axis in (spec.shape or ())[1:]):
        samples = Golden.load(context.run.artifact("20-export", "golden").path).dataset.inputs
        shapes = {name: array.shape for name, array in samples.items()}
    return default_profile(model.inputs, config.profile, shapes, config.shortest)


def folder_digest(folder: str | None) -> str | None:
    """Digest of a folder's listing: names, sizes and times of modification; None where there is no folder.

    Raises:
        ConfigError: there is no such folder.
    """
    if folder is None:
        return None
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"data.folder={folder} is not a folder.", hint="give the folder that holds the data files")
    listing = [
        [str(item.relative_to(path)), item.stat().st_size, item.stat().st_mtime_ns]
        for item in sorted(path.rglob("*"))
        if item.is_file()
    ]
    return digest_of_json(listing)[:16]
