"""What is remembered of what strangers send, which must not grow with them."""

from __future__ import annotations

from typing import Any


def remember(known: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Remember, but not for ever: where `most` are known already, those are forgotten."""
    if len(known) >= most:
        known.clear()
    known[key] = value
