"""What a model answers, by the names the pipeline gives: a tensor, several in order, or a dict or dataclass by its own names."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpdeploy.errors import StageFailedError, closest_names


def named_outputs(answer: Any, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """The tensors of an answer, in the order of `names`.

    Args:
        answer: a tensor, a sequence of tensors, or a mapping or dataclass (transformers' `ModelOutput` among them) that has the names;
            what else is in it is left out.
        names: `export.output_names`.

    Raises:
        StageFailedError: another number of outputs, no such name, or an output that is no tensor.
    """
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type | Mapping):
        answer = {item.name: getattr(answer, item.name) for item in dataclasses.fields(answer)}
    if isinstance(answer, Mapping):
        found = [_by_name(answer, name) for name in names]
    else:
        found = list(answer) if isinstance(answer, tuple | list) else [answer]
        if len(found) != len(names):
            raise StageFailedError(
                f"The model answers {len(found)} outputs, export.output_names names {len(names)}.",
                hint="name each output in export.output_names",
            )
    for name, value in zip(names, found, strict=True):
        if not isinstance(value, torch.Tensor):
            raise StageFailedError(f"The model's output '{name}' is {type(value).__name__}, expected a tensor.")
    return tuple(found)


def _by_name(answer: Mapping[Any, Any], name: str) -> Any:
    if answer.get(name) is None:
        there = [str(key) for key, value in answer.items() if value is not None]
        raise StageFailedError(
            f"The model answers {', '.join(there) or 'nothing'}, and no '{name}'.",
            hint=f"export.output_names names the outputs to keep; closest: {closest_names(name, there)}",
        )
    return answer[name]


def answering_tuples(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """The model with its outputs as a tuple in the order of `names`; it shares its weights, and its modules keep their names."""
    shallow = copy.copy(model)
    forward = model.forward
    shallow.forward = lambda *inputs: named_outputs(forward(*inputs), names)
    return shallow
