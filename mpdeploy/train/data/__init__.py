"""Loaders: where samples come from. Each is a `load(config: DataConfig) -> Splits` that a pipeline names in `data.load`.

    load_digits       scikit-learn's 8x8 digits (the default)          image float32 [n, 1, 8, 8]
    load_mnist        IDX files in data.folder, or `datasets`          image float32 [n, 1, 28, 28]
    load_images       a folder of images, one sub-folder a class       image float32 [n, 3, height, width]
    load_text         csv, tsv, jsonl, parquet or `datasets`, GLUE     input_ids, attention_mask int64 [n, length]
    load_docstrings   docstrings of Python's own library               the same
    load_arrays       .npz files                                       as they are

What a loader imports (PIL, pyarrow, transformers, ...) it imports when it is called.
"""

from __future__ import annotations

from mpdeploy.train.data.arrays import load_arrays
from mpdeploy.train.data.digits import load_digits
from mpdeploy.train.data.docstrings import load_docstrings
from mpdeploy.train.data.images import load_images
from mpdeploy.train.data.mnist import load_mnist
from mpdeploy.train.data.text import load_text

__all__ = ["load_arrays", "load_digits", "load_docstrings", "load_images", "load_mnist", "load_text"]
