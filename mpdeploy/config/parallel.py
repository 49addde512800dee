"""The section `train.parallel`: how training is spread over the ranks that torchrun starts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mpdeploy.config.section import Section


class ParallelConfig(Section):
    """How training is spread over the ranks that torchrun starts. Without torchrun there is one rank, and `ddp` changes nothing.

    `train.batch_size` stays the batch of all ranks together, so that the loss curve does not depend on how many there are.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """`ddp`: a copy of the model on each rank, gradients averaged. `fsdp2`: weights, gradients and optimiser state split over the ranks;
    half precision is then that of its mixed-precision policy (all of a module in half, sums of gradients in FP32), not autocast."""
    shard_modules: tuple[str, ...] = ()
    """fsdp2: modules whose weights are gathered and freed on their own, such as each layer of a transformer: names or globs, the
    outermost matches count. None: the model is gathered as a whole, which saves optimiser state and gradients only."""
    tensor_parallel: int = Field(1, ge=1)
    """fsdp2: split single layers over so many ranks, as `tensor_plan` says; the others are data parallel. It divides the number of ranks."""
    tensor_plan: dict[str, Literal["colwise", "rowwise"]] = Field(default_factory=dict)
    """Linear and embedding layers to split, names or globs: `colwise` (each rank computes some outputs; the layer before) and `rowwise`
    (each takes some inputs, outputs are summed; the layer after). A pair needs nothing but elementwise work in between."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """How ranks talk. `auto`: nccl on CUDA, gloo on a CPU."""
    sync_batchnorm: bool = False
    """On CUDA: BatchNorm takes its statistics over all ranks. Else each rank takes its own, and rank 0's running ones ship."""
    find_unused_parameters: bool = False
    """ddp: some weights get no gradient in some steps. Costs a walk over the graph each step."""

    def fault(self) -> str | None:
        """What does not fit together, or None. Asked for when training begins: `--set` replaces one field at a time."""
        if self.tensor_parallel > 1 and self.strategy != "fsdp2":
            return "tensor_parallel goes with strategy 'fsdp2', which splits what the plan leaves whole"
        if (self.tensor_parallel > 1) != bool(self.tensor_plan):
            return f"tensor_parallel is {self.tensor_parallel} and tensor_plan has {len(self.tensor_plan)} rows: they go together"
        if self.shard_modules and self.strategy != "fsdp2":
            return "shard_modules goes with strategy 'fsdp2'"
        return None
