"""The base of every section of a pipeline file: frozen, validated when it is made, and serialisable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict

from mpdeploy.user_code import describe_callable

UserFunction = Callable[..., Any]


class Section(BaseModel):
    """The base of every section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)

    def to_json(self) -> dict[str, Any]:
        """The section as plain JSON; a function becomes its name and the digest of the source it can reach."""
        return {name: _plain(getattr(self, name)) for name in type(self).model_fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if callable(value):
        return describe_callable(value)
    return value
