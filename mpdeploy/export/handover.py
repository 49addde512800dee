"""What training learnt, handed to conversion: modules become tensors and nodes, through what the exporter wrote into the graph.

Every node carries the path of the module it came from (`pkg.torch.onnx.name_scopes`), and every weight is named after its module. A
BatchNorm that was folded into its Conv gives its scope to the fused node; the Conv is then found by its weight. A container stands for
all nodes below it. Modules that leave no trace in the graph (a Dropout, a layer that only training calls) are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mpdeploy.precision.graph_index import GraphIndex
from mpdeploy.precision.keep_list import scopes_of


@dataclass(frozen=True)
class Handover:
    """Ranges by tensor, and the modules that have none.

    Attributes:
        tensors: tensor name -> largest magnitude that training saw there.
        modules: tensor name -> the module it was recorded at.
        folded: module -> the module whose output its node makes now: its own output is no tensor of the graph any more.
        unmapped: modules without a node.
    """

    tensors: Mapping[str, float]
    unmapped: tuple[str, ...]
    modules: Mapping[str, str] = field(default_factory=dict)
    folded: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as 20-export writes it into `amax.json`."""
        return {
            "tensors": dict(self.tensors),
            "modules": dict(self.modules),
            "folded": dict(self.folded),
            "unmapped": list(self.unmapped),
        }


@dataclass(frozen=True)
class ModuleNodes:
    """Nodes by module.

    Attributes:
        nodes: node id -> the module, of those asked for, that it belongs to.
        unmapped: modules without a node.
    """

    nodes: Mapping[str, str]
    unmapped: tuple[str, ...]


def tensors_from_modules(onnx_path: Path, amax_of_module: Mapping[str, float]) -> Handover:
    """Map module name -> largest output magnitude onto the tensor that the module's last own node makes.

    The range of a module that was folded into another's node is of a tensor that no longer exists: it is listed under `folded`. Ranges
    that are not finite are not handed over.
    """
    index = _index(onnx_path)
    last: dict[str, str] = {}
    holder: dict[str, str] = {}  # module -> the innermost scope of a node that takes its weights
    for node in index.nodes.values():
        modules = _modules_of(node)
        name = node.outputs[0].name
        if modules and name:
            last[modules[-1]] = name
        for module in _owners_of_weights(node):
            holder[module] = modules[-1] if modules else ""
    mapped = {
        module: last[module] for module, value in amax_of_module.items() if module in last and math.isfinite(value)
    }
    tensors = {tensor: amax_of_module[module] for module, tensor in mapped.items()}
    origin = {tensor: module for module, tensor in mapped.items()}
    lost = [module for module in amax_of_module if module not in last]
    return Handover(
        tensors,
        tuple(module for module in lost if not holder.get(module)),
        origin,
        {module: holder[module] for module in lost if holder.get(module)},
    )


def nodes_from_modules(onnx_path: Path, modules: Iterable[str]) -> ModuleNodes:
    """The nodes that came from modules, by name: those of the module itself, those below it, and those its weights went into."""
    index = _index(onnx_path)
    nodes: dict[str, str] = {}
    found: set[str] = set()
    for module in modules:
        for node_id, node in index.nodes.items():
            places = [*_modules_of(node), *_owners_of_weights(node)]
            if any(place == module or place.startswith(f"{module}.") for place in places):
                nodes.setdefault(node_id, module)
                found.add(module)
    return ModuleNodes(nodes, tuple(module for module in modules if module not in found))


def keep_file_json(found: ModuleNodes) -> dict[str, Any]:
    """Modules that stayed FP32 in training, as a keep-list file (`--keep @FILE`)."""
    return {
        "keep": [
            {"node": node, "reason": f"fp32_modules: '{module}' was kept in FP32 in training"}
            for node, module in found.nodes.items()
        ],
        "unmapped": list(found.unmapped),
    }


def _index(path: Path) -> GraphIndex:
    return GraphIndex.of(ir.load(path))


def _modules_of(node: ir.Node) -> list[str]:
    """The modules a node came from, outermost first. The last scope is the op itself, the first the whole model."""
    return [scope for scope in scopes_of(node)[:-1] if scope]


def _owners_of_weights(node: ir.Node) -> list[str]:
    """The modules whose parameters a node takes: `encoder.0.weight` belongs to `encoder.0`."""
    names = [value.name for value in node.inputs if value is not None and value.is_initializer()]
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name and "." in name))
