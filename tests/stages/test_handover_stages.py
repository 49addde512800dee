"""From 10-train to 30-convert: what training learnt stands in plan.json as the reason of kept nodes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_train_stage import FEATURES, blobs
from torch import nn

from mpdeploy.config import DataConfig, Pipeline, TrainConfig
from mpdeploy.pipeline import Context, Silent, run_stages
from mpdeploy.run_dir import RunDir
from mpdeploy.stages.convert import ConvertStage
from mpdeploy.stages.export import ExportStage
from mpdeploy.stages.train import TrainStage
from mpdeploy.train.splits import Splits

SIZES = {"train": (0, 96), "early_stopping": (1000, 32), "calibration": (2000, 32), "gate": (3000, 32)}


class Grows(nn.Module):
    """Its first layer passes its input on (and is not trained); the Tanh behind makes everything small again."""

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.squash, self.head = nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, 4)
        with torch.no_grad():
            self.grow.weight.copy_(torch.eye(FEATURES))
            self.grow.bias.zero_()
        self.grow.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.squash(self.grow(x)))


def load_with_a_large_sample(config: DataConfig) -> Splits:
    """Of 96 training samples one is large; of 32 calibration samples none is."""
    parts = {name: blobs(*of) for name, of in SIZES.items()}
    parts["train"].inputs["x"][17, 0] = np.float32(71_000.0)
    return Splits(**parts)


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> dict[str, str]:
    """Node -> why it is kept, of a run whose training kept `head` in FP32."""
    pipeline = Pipeline(
        name="handover",
        data=DataConfig(load=load_with_a_large_sample),
        train=TrainConfig(model=Grows, epochs=1, batch_size=32, cpu_precision="bf16", fp32_modules=("head",)),
    )
    path = tmp_path_factory.mktemp("handover") / "run"
    with RunDir.create(path) as run:
        run.set_header(pipeline=pipeline.name)
        run_stages([TrainStage(), ExportStage(), ConvertStage(())], Context(run, pipeline, Silent()))
    plan = json.loads((path / "30-convert" / "plan.fp16.json").read_text())
    return {entry["node"]: entry["reason"] for entry in plan["keep"]}


def test_a_range_that_calibration_missed_is_a_reason_that_names_the_module(plan):
    found = [reason for reason in plan.values() if "reaches 7.1e+04" in reason]
    assert found
    largest = float(np.abs(blobs(*SIZES["calibration"]).inputs["x"]).max())
    assert all(f"in training at module 'grow', {largest:.4g} in calibration" in reason for reason in found)
    assert largest < 20


def test_modules_that_stayed_fp32_in_training_stay_fp32_and_say_so(plan):
    kept = [node for node, reason in plan.items() if "fp32_modules: 'head' was kept in FP32 in training" in reason]
    assert len(kept) == 1
