"""The part of JSON Schema that the published schemas use; an unknown keyword is an error here too."""

from __future__ import annotations

from typing import Any

_KNOWN = {
    "$schema", "title", "description", "type", "properties", "required", "additionalProperties", "items", "enum",
    "const", "anyOf", "minimum", "minItems", "maxItems",
}  # fmt: skip
_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def faults(value: Any, schema: dict[str, Any], path: str = "$") -> list[str]:
    """What is wrong with `value`, each with its place."""
    assert set(schema) <= _KNOWN, set(schema) - _KNOWN
    found: list[str] = []
    if "anyOf" in schema and all(faults(value, choice, path) for choice in schema["anyOf"]):
        found.append(f"{path}: {value!r} is none of the choices")
    kind = schema.get("type")
    if kind in ("number", "integer"):
        if isinstance(value, bool) or not isinstance(value, int if kind == "integer" else (int, float)):
            return [f"{path}: {value!r} is no {kind}"]
        if value < schema.get("minimum", value):
            found.append(f"{path}: {value} is too small")
    elif kind is not None and not isinstance(value, _TYPES[kind]):
        return [f"{path}: {value!r} is no {kind}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is not in {schema['enum']}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{path}: {value!r} is not {schema['const']!r}")
    if isinstance(value, dict):
        found += [f"{path}: lacks '{name}'" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", True))
            if inner is False:
                found.append(f"{path}: '{name}' is not in the schema")
            elif isinstance(inner, dict):
                found += faults(item, inner, f"{path}.{name}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{path}: {len(value)} items")
        for index, item in enumerate(value):
            found += faults(item, schema.get("items", {}), f"{path}[{index}]")
    return found
