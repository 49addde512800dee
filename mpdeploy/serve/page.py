"""The page at `/`: one self-contained file; what it shows it asks of the server's own endpoints."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def page() -> bytes:
    """The page, as UTF-8."""
    return files("mpdeploy.serve").joinpath("page.html").read_bytes()
