"""Part 1: training steps in FP32, TF32, BF16 and FP16, eager and compiled; and what accuracy comes out of them."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import Session
from torch import nn

from mpdeploy.artifact import Dataset
from mpdeploy.config import Pipeline, load_pipeline
from mpdeploy.train.loop import train
from mpdeploy.train.memory import SavedBytes
from mpdeploy.train.parity import held_out_answers
from mpdeploy.train.precision import PrecisionChoice, autocast, float32_arithmetic
from mpdeploy.train.splits import Splits

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Workload:
    """A model, the batch it is trained on, and the claim it is held against."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    claim: str


def workloads(root: Path, dry: bool) -> list[Workload]:
    """The two small CNNs, a ResNet-50 and a BERT-base, with sensible batches; tiny ones where `dry`."""
    generator = torch.Generator().manual_seed(0)
    digits, mnist = (load_pipeline(root / "pipelines" / name) for name in ("digits_cnn.py", "mnist_cnn.py"))
    small, images, texts = (16, 2, 2) if dry else (1024, 128, 32)
    side, length = (32, 16) if dry else (224, 128)

    def labels(count: int, classes: int) -> torch.Tensor:
        return torch.randint(0, classes, (count,), generator=generator)

    return [
        Workload("digits CNN", digits.train.model, (torch.rand(small, 1, 8, 8, generator=generator),), labels(small, 10), _CNN),
        Workload("MNIST-shaped CNN", mnist.train.model, (torch.rand(small, 1, 28, 28, generator=generator),), labels(small, 10), _CNN),
        Workload("ResNet-50", lambda: _resnet(dry), (torch.randn(images, 3, side, side, generator=generator),), labels(images, 1000), "-"),
        Workload("BERT-base", lambda: _bert(dry), (torch.randint(0, 1000, (texts, length), generator=generator),), labels(texts, 2), _BERT),
    ]  # fmt: skip


_CNN = "time -50 %, memory -50 %"
_BERT = "time -40 %, memory -30 %"


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs).logits


def _resnet(dry: bool) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]} if dry else {}
    return _Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000, **small)))


def _bert(dry: bool) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    small = (
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64} if dry else {}
    )
    return _Logits(BertForSequenceClassification(BertConfig(num_labels=2, **small)))


class Steps:
    """A training of one workload in one precision: step after step on the same batch."""

    def __init__(self, workload: Workload, choice: PrecisionChoice, *, compiled: bool, dry: bool) -> None:
        torch.manual_seed(0)
        self.choice = choice
        self.model = workload.make().to(choice.device).train()
        if workload.inputs[0].ndim == 4:
            self.model = self.model.to(memory_format=torch.channels_last)
        self.inputs = tuple(
            x.to(choice.device).contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.to(choice.device)
            for x in workload.inputs
        )
        self.labels = workload.labels.to(choice.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=choice.device == "cuda")
        self.scaler = torch.amp.GradScaler(choice.device, enabled=choice.scales_loss)
        # without a GPU the same path is gone through without a C++ compiler
        self.call = torch.compile(self.model, backend="aot_eager" if dry else "inductor") if compiled else self.model

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        with float32_arithmetic(self.choice):
            with autocast(self.choice):
                outputs = self.call(*self.inputs)
            loss = nn.functional.cross_entropy(outputs.float(), self.labels)
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def saved_bytes(self) -> int:
        """What one forward pass keeps for backward."""
        saved = SavedBytes(self.model)
        with saved.measuring(), autocast(self.choice):
            outputs = self.model(*self.inputs)
        del outputs
        return saved.num_bytes


def step_times_ms(steps: Steps, count: int, warm_up: int) -> list[float]:
    """Milliseconds of each of `count` steps: between CUDA events on a GPU, by the clock on a CPU."""
    for _ in range(warm_up):
        steps.step()
    if steps.choice.device != "cuda":
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            steps.step()
            times.append((time.perf_counter() - begin) * 1e3)
        return times
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin_mark, end_mark in marks:
        begin_mark.record()
        steps.step()
        end_mark.record()
    torch.cuda.synchronize()
    return [begin_mark.elapsed_time(end_mark) for begin_mark, end_mark in marks]


@contextlib.contextmanager
def _backward_outside_autocast() -> Iterator[None]:
    """A compiled backward would run under autocast otherwise (pytorch#153044)."""
    import torch._functorch.config as functorch

    before = functorch.backward_pass_autocast
    functorch.backward_pass_autocast = "off"
    try:
        yield
    finally:
        functorch.backward_pass_autocast = before


def measure_steps(session: Session, workload: Workload, precision: str, *, compiled: bool) -> dict[str, Any]:
    """One cell of the table."""
    if session.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if session.device == "cuda" else 0
    choice = PrecisionChoice(precision, session.device, "the table", {})
    with _backward_outside_autocast():
        steps = Steps(workload, choice, compiled=compiled, dry=session.dry)
        times = step_times_ms(steps, 3 if session.dry else 40, 1 if session.dry else 12)
    found: dict[str, Any] = {
        "median_ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times), "steps": len(times),
        "batch": len(workload.labels), "loss_scale": steps.scaler.get_scale() if choice.scales_loss else None,
        "saved_bytes": None if compiled else steps.saved_bytes(),
    }  # fmt: skip
    if session.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    torch._dynamo.reset()
    return found


def amp(session: Session, root: Path) -> dict[str, Any]:
    """Step times and memory of every workload, then accuracy of the two small ones over paired seeds."""
    table: dict[str, Any] = {}
    for workload in workloads(root, session.dry):
        rows = table.setdefault(workload.name, {"claim": workload.claim, "cells": {}})
        for compiled in (False, True):
            for precision in PRECISIONS:
                if precision == "tf32" and session.device != "cuda":
                    session.skip(f"{workload.name} in tf32", "TF32 is a mode of NVIDIA tensor cores")
                    continue
                label = f"{precision}{', compiled' if compiled else ''}"
                cell = session.measured(
                    f"AMP {workload.name}, {label}",
                    lambda w=workload, p=precision, c=compiled: measure_steps(session, w, p, compiled=c),
                )
                if cell is not None:
                    rows["cells"][label] = cell
    seeds = {}
    for name, file in (("digits CNN", "digits_cnn.py"), ("MNIST-shaped CNN", "mnist_cnn.py")):
        found = session.measured(
            f"accuracy of the {name} over paired seeds",
            lambda file=file: accuracy_over_seeds(session, load_pipeline(root / "pipelines" / file), root),
            needs_s=60,
        )
        if found is not None:
            seeds[name] = found
    return {"steps": table, "accuracy": seeds}


def accuracy_over_seeds(session: Session, pipeline: Pipeline, root: Path) -> dict[str, Any]:
    """Held-out accuracy by precision, each seed with the same initial weights, order and augmentation in all of them."""
    digits = load_pipeline(root / "pipelines" / "digits_cnn.py").data
    splits = digits.load(digits)
    if "mnist" in pipeline.name:
        splits = Splits(
            *(_enlarged(part) for part in (splits.train, splits.early_stopping, splits.calibration, splits.gate))
        )
    config = pipeline.train.model_copy(update={"epochs": 1 if session.dry else 15, "reference": False})
    if session.dry:
        splits = Splits(splits.train.take(slice(0, 64)), splits.early_stopping, splits.calibration, splits.gate)
    found: dict[str, Any] = {}
    for precision in PRECISIONS:
        if precision == "tf32" and session.device != "cuda":
            continue
        scores, scales, skipped = [], [], 0
        for seed in range(1 if session.dry else 5):
            seeded = config.model_copy(update={"seed": seed})
            choice = PrecisionChoice(precision, session.device, "the table", {})
            with tempfile.TemporaryDirectory() as folder:
                run = train(
                    seeded, choice, splits.train, splits.early_stopping, state_path=Path(folder) / "state.pt",
                    state_key="table", progress=lambda done, total, text: None,
                )  # fmt: skip
            answers = held_out_answers(seeded, session.device, run.model, splits.gate)
            scores.append(float((np.argmax(answers.outputs, -1) == splits.gate.labels).mean()))
            scales = [epoch.get("loss_scale") for epoch in run.history]
            skipped += run.num_skipped
        found[precision] = {"accuracy": scores, "loss_scale_by_epoch": scales, "num_skipped": skipped}
    return found


def _enlarged(part: Dataset) -> Dataset:
    images = nn.functional.interpolate(torch.from_numpy(part.inputs["image"]), (28, 28), mode="bilinear")
    return Dataset({"image": images.numpy()}, part.ids, part.labels)
