"""Small stand-ins in the real formats: transformers folders with random weights, MNIST's IDX files from digits, folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpdeploy.train.data.idx import write_idx

WORDS = """a the return value of this file message thread socket number date test module class object name if not none is it in to and
or for with from that be are by on as an call function method string list default set get given all new raise error true false write read
"""


def bert_folder(folder: Path, num_labels: int = 2) -> Path:
    """A BERT classifier of two layers and 32 features, with a WordPiece tokenizer of single letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{letter}" for letter in letters), *WORDS.split()]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, num_labels=num_labels,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def vit_folder(folder: Path, num_labels: int = 10) -> Path:
    """A ViT classifier of two layers for 16x16 RGB images, with its image processor's file."""
    import json

    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        num_labels=num_labels,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {
        "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
        "size": {"height": 16, "width": 16},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def digits_28() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as MNIST has them: uint8 [1797, 28, 28] and uint8 labels. Each pixel is tripled, two more are border."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    large = np.kron((images.reshape(-1, 8, 8) * 15.9375).astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.pad(large, ((0, 0), (2, 2), (2, 2))), labels.astype(np.uint8)


def mnist_folder(folder: Path, *, suffix: str = "", num_test: int = 360, num_train: int = 1437) -> Path:
    """MNIST's four files, made from digits: the first images are the test's."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits_28()
    parts = {"t10k": slice(0, num_test), "train": slice(num_test, num_test + num_train)}
    for name, part in parts.items():
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images[part])
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels[part])
    return folder


def image_folder(folder: Path, count: int = 120) -> Path:
    """`count` digits as PNG files, one sub-folder a class."""
    from PIL import Image

    images, labels = digits_28()
    for number, (image, label) in enumerate(zip(images[:count], labels[:count], strict=True)):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder
