"""Any transformers classifier in a local folder, fine-tuned on your data, to gated engines.

`mpdeploy train-and-export pipelines/finetune_hf.py --set data.model_folder=MODEL --set data.folder=DATA`

MODEL is what `save_pretrained` writes, with its tokenizer (DATA: train.tsv, dev.tsv, ...) or its image processor (DATA: one sub-folder
of images a class). Without DATA a text model learns Python's docstrings; without MODEL it is MiniLM. Nothing is fetched.
"""

from __future__ import annotations

import torch
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig, ValidationConfig
from mpdeploy.train.data import load_docstrings, load_images, load_text
from mpdeploy.train.data.docstrings import SUBJECTS
from mpdeploy.train.data.images import image_classes
from mpdeploy.train.data.pretrained import (
    DecodedText,
    FineTuning,
    MadeForData,
    from_folder,
    image_norm_of,
    is_image_model,
)
from mpdeploy.train.data.text import class_names
from mpdeploy.train.splits import Splits


class TextModel(nn.Module):
    """input_ids, attention_mask (and token_type_ids) [n, length] -> logits [n, classes]."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.classifier(input_ids=input_ids, attention_mask=attention_mask, **more).logits


class ImageModel(nn.Module):
    """image [n, channels, height, width] in [0, 1] -> logits [n, classes]; the image processor's normalisation is part of the model."""

    def __init__(self, classifier: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.classifier = classifier
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.classifier(pixel_values=(image - self.mean) / self.std).logits


def load(config: DataConfig) -> Splits:
    """Images for a model with an image processor, else sentences."""
    if is_image_model(config):
        return load_images(config.model_copy(update={"image_size": image_norm_of(config).size}))
    return load_docstrings(config) if config.folder is None else load_text(config)


def classifier(config: DataConfig) -> nn.Module:
    """The folder's own classifier, with a new head where the data has another number of classes."""
    if is_image_model(config):
        norm, head = image_norm_of(config), {"num_labels": len(image_classes(config)), "ignore_mismatched_sizes": True}
        return ImageModel(from_folder("AutoModelForImageClassification", config, **head), norm.mean, norm.std)
    classes = tuple(SUBJECTS) if config.folder is None else class_names(config)
    head = {"num_labels": len(classes), "ignore_mismatched_sizes": True}
    return TextModel(from_folder("AutoModelForSequenceClassification", config, **head))


def pipeline() -> Pipeline:
    """Choices only."""
    return FineTuning(
        name="finetune_hf",
        data=DataConfig(load=load, max_length=128),
        train=TrainConfig(
            model=MadeForData(classifier),
            epochs=3,
            batch_size=32,
            learning_rate=5e-5,
            weight_decay=0.01,
            precision="auto",
        ),
        validation=ValidationConfig(describe_samples=DecodedText()),
    )
