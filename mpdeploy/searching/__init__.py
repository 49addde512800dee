"""The search on a real model: joins `precision.search`, which runs nothing, with ONNX Runtime and the data.

found = search_model(Path("model.onnx"), data="calib.npz", max_drift=1e-3)
found.plan                      what `rewrite` carries out
found.write_keep_list(path)     what `--keep @path` takes back
"""

from __future__ import annotations

from mpdeploy.searching.gate import parse_drop
from mpdeploy.searching.model_search import ModelSearch, search_model

__all__ = ["ModelSearch", "parse_drop", "search_model"]
