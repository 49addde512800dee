"""`torchmetrics:NAME(argument=value, ...)`: a metric of torchmetrics, with arguments, as text that a config can hold."""

from __future__ import annotations

import ast
from typing import Any

TORCHMETRICS = "torchmetrics:"


def parse_torchmetrics(text: str) -> tuple[str, dict[str, Any]]:
    """'torchmetrics:MulticlassF1Score(average="macro")' -> ('MulticlassF1Score', {'average': 'macro'}).

    Raises:
        ValueError: it is not written that way, or an argument is no literal.
    """
    if not text.startswith(TORCHMETRICS):
        raise ValueError(f"write it as {TORCHMETRICS}NAME(argument=value), or give a function of (outputs, labels)")
    try:
        expression = ast.parse(text.removeprefix(TORCHMETRICS).strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"'{text}' does not parse: {error.msg}") from error
    call = expression if isinstance(expression, ast.Call) else None
    named = expression if call is None else call.func
    if not isinstance(named, ast.Name) or (call is not None and call.args):
        raise ValueError(f"'{text}': write it as {TORCHMETRICS}NAME(argument=value), each argument with its name")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords if call is not None else ():
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError as error:
            raise ValueError(f"'{text}': the argument '{keyword.arg}' is no plain value (a number, a text)") from error
    return named.id, arguments
