"""How a backend declares what its build can be told: one field of a frozen dataclass an option, with its kind and a sentence.

The same names and values serve everywhere: `mpdeploy build --option NAME=VALUE` (where a value is text), `BuildConfig.options` of a
pipeline, and the sidecar of what was built. `mpdeploy doctor --engine NAME` lists them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from mpdeploy.errors import ConfigError, UsageError, closest_names

T = TypeVar("T")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True, slots=True)
class Kind:
    """What values an option takes: in words, and a function that reads one and raises ValueError for any other."""

    words: str
    read: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class OptionRow:
    """An option as `doctor` lists it."""

    name: str
    takes: str
    default: Any
    text: str
    lacking: str = ""
    """Why the engine does not have it, or cannot build with it on this machine."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        default = list(self.default) if isinstance(self.default, tuple) else self.default
        found = {"name": self.name, "takes": self.takes, "default": default, "text": self.text}
        return found | ({"lacking": self.lacking} if self.lacking else {})


def option(default: Any, kind: Kind, text: str) -> Any:
    """A field of an options class."""
    return field(default=default, metadata={"kind": kind, "text": text})


def rows_of(options: type[Any]) -> tuple[OptionRow, ...]:
    """Every option of a class, in the order of its fields."""
    return tuple(
        OptionRow(item.name, item.metadata["kind"].words, item.default, item.metadata["text"])
        for item in fields(options)
    )


def read_options(options: type[T], given: Mapping[str, Any], *, title: str, engine: str) -> T:
    """Make an options class of what a command line, a pipeline file or a sidecar gave.

    Args:
        options: the class.
        given: name -> value, or the text of one. None stands for an option's default where that is None.
        title: the library's name in messages.
        engine: its row in the engine table.

    Raises:
        ConfigError: an unknown option (with the closest ones), or a value that does not fit.
    """
    known = {item.name: item for item in fields(options)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"{title} has no build option '{name}'.",
                hint=f"closest names: {closest_names(name, known)}; mpdeploy doctor --engine {engine} lists them all",
            )
        kind: Kind = known[name].metadata["kind"]
        if value is None and known[name].default is None:
            continue
        try:
            values[name] = kind.read(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"The build option {name} is {value!r}.", hint=f"{title}'s {name} takes {kind.words}"
            ) from error
    return options(**values)


def options_to_json(options: Any) -> dict[str, Any]:
    """An options object as plain JSON, for a sidecar."""
    values = dataclasses.asdict(options)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """`["tf32=true", "workspace_bytes=1GiB"]` -> `{"tf32": "true", "workspace_bytes": "1GiB"}`.

    Raises:
        UsageError: one without `=`, or one name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not value:
            raise UsageError(
                f"--option {text}: write it as NAME=VALUE.", hint="for example --option workspace_bytes=1GiB"
            )
        if name in found:
            raise UsageError(f"--option {text}: {name} was given twice.", hint="lists are written NAME=A,B")
        found[name] = value.strip()
    return found


# -- kinds -------------------------------------------------------------------------------------------------------------


def _flag(value: Any) -> bool:
    found = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(value)
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(value)
    return int(value)


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", value.strip().upper())
        if match is None:
            raise ValueError(value)
        value = int(float(match[1]) * _UNITS[match[2] or ""])
    found = _whole(value)
    if found < 1:
        raise ValueError(value)
    return found


def _file(value: Any) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(value)
    return str(value)


FLAG = Kind("true or false", _flag)
BYTES = Kind("a number of bytes, like 1073741824 or 1GiB", _bytes)
FILE = Kind("a path", _file)


def whole(low: int, high: int | None = None) -> Kind:
    """A whole number between two ends."""

    def read(value: Any) -> int:
        found = _whole(value)
        if found < low or (high is not None and found > high):
            raise ValueError(value)
        return found

    return Kind(f"a whole number from {low}" + ("" if high is None else f" to {high}"), read)


def one_of(*words: str) -> Kind:
    """One of a few words, in any case."""

    def read(value: Any) -> str:
        found = next((word for word in words if isinstance(value, str) and word.lower() == value.lower()), None)
        if found is None:
            raise ValueError(value)
        return found

    return Kind(f"one of {', '.join(words)}", read)


def names(pattern: str, example: str) -> Kind:
    """A list of names that fit a pattern: `A,B` as text."""

    def read(value: Any) -> tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else list(value)
        found = tuple(item.strip() for item in items if isinstance(item, str))
        if len(found) != len(items) or not all(re.fullmatch(pattern, item) for item in found):
            raise ValueError(value)
        return found

    return Kind(f"a list of names like {example}", read)
