"""`--set train.epochs=3`: one field of a pipeline replaced, with the same validation as in the file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mpdeploy.config.pipeline import Gate, Pipeline
from mpdeploy.config.section import Section
from mpdeploy.errors import ConfigError, closest_names


def apply_overrides(pipeline: Pipeline, overrides: Iterable[str]) -> Pipeline:
    """Return `pipeline` with each `a.b=value` applied.

    `value` is read as JSON where it is JSON (`3`, `true`, `["openvino"]`), else as text. All faults are reported at once.

    Raises:
        ConfigError: a malformed override, an unknown key (with the closest ones), a value of the wrong type.
    """
    faults: list[str] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            faults.append(f"--set {override}: write it as key=value, for example --set train.epochs=3")
            continue
        try:
            pipeline = _replace(pipeline, key.split("."), text, key)
        except ConfigError as error:
            faults.append(str(error).replace("\n\nhint: ", " (") + (")" if error.hint else ""))
    if faults:
        raise ConfigError("\n".join(faults))
    return pipeline


def _replace(section: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    fields = type(section).model_fields
    if name not in fields:
        everywhere = _keys(section)
        prefix = key[: len(key) - len(".".join(path))]
        raise ConfigError(
            f"--set {key}: there is no '{prefix}{name}'",
            hint=f"closest keys: {closest_names('.'.join(path), everywhere)}",
        )
    value = getattr(section, name)
    if rest and isinstance(value, Section):
        return _validated(section, name, _replace(value, rest, text, key), key)
    if rest and isinstance(value, tuple) and value and isinstance(value[0], Gate):
        by_id = {gate.id: gate for gate in value}
        if rest[0] not in by_id or len(rest) != 2:
            raise ConfigError(
                f"--set {key}: there is no gate '{rest[0]}' with such a field",
                hint=f"write gates.ID.limit=...; closest ids: {closest_names(rest[0], by_id)}",
            )
        changed = _replace(by_id[rest[0]], rest[1:], text, key)
        return _validated(section, name, tuple(changed if gate.id == rest[0] else gate for gate in value), key)
    if rest and isinstance(value, Mapping):
        return _validated(section, name, _with_entry(value, rest, text), key)
    if rest or isinstance(value, Section):
        raise ConfigError(f"--set {key}: '{name}' has no such part", hint=f"keys: {', '.join(_keys(section)[:8])}")
    return _validated(section, name, _parsed(fields[name].annotation, text, key), key)


def _with_entry(value: Mapping[str, Any], path: list[str], text: str) -> dict[str, Any]:
    """A mapping with the entry at `path` replaced or added: `build.options.tensorrt.tf32=true`."""
    if len(path) > 1:
        inner = value.get(path[0], {})
        return {**value, path[0]: _with_entry(inner if isinstance(inner, Mapping) else {}, path[1:], text)}
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    return {**value, path[0]: found}


def _parsed(annotation: Any, text: str, key: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    candidates: list[Any] = [text]
    with contextlib.suppress(ValueError):  # plain text is no JSON
        candidates.insert(0, json.loads(text))
    fault = ""
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except ValidationError as error:
            fault = fault or "; ".join(item["msg"] for item in error.errors())
    raise ConfigError(f"--set {key}={text}: {fault[0].lower()}{fault[1:]}")


def _validated(section: Any, name: str, value: Any, key: str) -> Any:
    values = {field: getattr(section, field) for field in type(section).model_fields} | {name: value}
    try:
        return type(section)(**values)
    except ValidationError as error:
        faults = "; ".join(item["msg"] for item in error.errors())
        raise ConfigError(f"--set {key}={value}: {faults}") from error


def _keys(section: Section, prefix: str = "") -> list[str]:
    keys = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            keys += _keys(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Gate):
            keys += [f"{prefix}{name}.{gate.id}.{field}" for gate in value for field in ("limit", "at", "advisory")]
        else:
            keys.append(f"{prefix}{name}")
    return keys
