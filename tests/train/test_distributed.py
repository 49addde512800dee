"""Two ranks train what one trains: with DDP, with FSDP2, with layers split, through skipped steps, and on from another's checkpoint.

Tolerance of the curves: FP32 sums over a batch are made in two parts, which moves the last bit of a gradient (2^-24, relative), and
Adam's division makes 12 steps of that at most some 1e-6 of a weight near 1. A wrong factor (the batch's share, the number of ranks) is
1e-2 and more: without clipping at 1.0 and with the uneven last batch it does not cancel.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_training import BY_TENSOR, TOTAL, TwoLinear
from small_training import BATCH, blobs, choice_of
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.errors import ConfigError, UnavailableError
from mpdeploy.train.feeding import Feeder, share_of
from mpdeploy.train.loop import train
from mpdeploy.train.ranks import ALONE, Ranks, together
from mpdeploy.train.wrapping import check, gradient_norm

SCRIPT = Path(__file__).with_name("ranks_training.py")
CURVE = 2e-6
"""Relative, see above."""
Case = list[dict[str, Any]]


def trained(folder: Path, *names: str) -> dict[str, Case]:
    """Case -> what each rank saw."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Case] = json.loads(done.stdout)
    return found


def same_curve(case: Case, reference: Case, tolerance: float = CURVE) -> None:
    """Losses, evaluations, norms and shipped weights are those of the reference, on every rank that knows them."""
    for rank in case:
        assert rank["losses"] == pytest.approx(reference[0]["losses"], rel=tolerance)
        for found, expected in zip(rank["stopping"], reference[0]["stopping"], strict=True):
            assert found == pytest.approx(expected, rel=tolerance)
        assert [float(norm) for norm in rank["norms"]] == pytest.approx(
            [float(norm) for norm in reference[0]["norms"]], rel=10 * tolerance
        )
        assert rank["best"] == reference[0]["best"]
    for name, expected in reference[0]["weights"].items():
        assert case[0]["weights"][name] == pytest.approx(expected, rel=tolerance, abs=tolerance), name


def decided_alike(case: Case) -> None:
    """Whatever a rank decides by is the same to the last digit on all."""
    for name in ("losses", "stopping", "norms", "skipped", "scales", "best"):
        assert [rank[name] for rank in case] == [case[0][name]] * len(case), name


def test_two_ranks_with_ddp_have_the_loss_curve_and_the_weights_of_one(tmp_path):
    """With accumulation over micro-batches, and a last batch of one sample, of which rank 0 has none."""
    found = trained(tmp_path, "ddp")
    same_curve(found["ddp"], found["one"])
    decided_alike(found["ddp"])
    assert found["ddp"][0]["weights"] == found["ddp"][1]["weights"]
    assert found["one"][0]["losses"][-1] < 0.6 * found["one"][0]["losses"][0], "it learnt nothing: any curve would do"


@pytest.mark.slow
def test_a_split_model_has_the_loss_curve_and_the_weights_of_one_rank(tmp_path):
    found = trained(tmp_path, "fsdp2", "fsdp2_by_layer", "tensor", "average")
    for name in ("fsdp2", "fsdp2_by_layer", "tensor"):
        same_curve(found[name], found["one"])
        decided_alike(found[name])
    for name in ("fsdp2", "fsdp2_by_layer"):
        parts = [len(rank["weights"]["first.weight"]) for rank in found[name]]
        assert parts == [32 * 16, 32 * 16 // 2], "rank 0 ships the whole, the other has its half"
    for name in ("average_ddp", "average_fsdp2"):
        same_curve(found[name], found["average_one"])
    assert found["average_one"][0]["weights"] != found["one"][0]["weights"]


@pytest.mark.slow
def test_all_ranks_skip_the_same_steps_where_fp16_overflows(tmp_path):
    """Each rank of a split model sees a part of the gradients; torch puts together what ranks of the first gradient's mesh saw, and no more."""
    found = trained(tmp_path, "skips")
    for name in ("skips_ddp", "skips_fsdp2", "skips_tensor"):
        decided_alike(found[name])
        assert 0 < len(found[name][0]["skipped"]) < TOTAL
        assert all(math.isfinite(value) for values in found[name][0]["weights"].values() for value in values)
        assert found[name][0]["losses"] == pytest.approx(
            found["skips_one"][0]["losses"], rel=1e-3
        )  # of FP16's rounding


@pytest.mark.slow
def test_checkpoints_are_gone_on_from_by_one_rank_and_by_two(tmp_path):
    found = trained(tmp_path, "resumed")
    names = ["resumed_ddp_1", "resumed_ddp_2", "resumed_fsdp2_1", "resumed_fsdp2_2", "resumed_tensor_2"]
    assert sorted(names) == sorted(name for name in found if name.startswith("resumed"))
    for name in names:
        assert found[name][0]["first_step"] == 7, "the state of step 6 was there"
        same_curve(found[name], found["whole"])
    kept = [path.name for path in (tmp_path / "resumed_fsdp2_2" / "state.amp.dcp").iterdir()]
    assert kept == ["3-0"], "parts of older states are removed"


@pytest.mark.slow
def test_dropout_differs_between_ranks_and_goes_on_where_it_stopped(tmp_path):
    found = trained(tmp_path, "dropout")
    one, two = (rank["dropped"] for rank in found["dropout"])
    assert sum(a == b for a, b in zip(one, two, strict=True)) < len(one) / 2
    for whole, resumed in zip(found["dropout"], found["dropout_resumed"], strict=True):
        assert resumed["dropped"] == whole["dropped"][-len(resumed["dropped"]) :]
        assert resumed["weights"] == whole["weights"]
    weights = [rank["weights"] for rank in found["dropout"]]
    assert weights[0] == weights[1], "BatchNorm's statistics among them"


@pytest.mark.slow
def test_a_split_model_in_half_keeps_batchnorm_and_fp32_modules_out_of_it(tmp_path):
    """Its policy rounds weights and outputs to BF16 where autocast rounds inputs: 2^-8 of a sum, and no more."""
    found = trained(tmp_path, "half")
    assert found["half_fsdp2"][0]["losses"] == pytest.approx(found["half_ddp"][0]["losses"], rel=2e-2)
    assert found["half_fsdp2"][0]["losses"] != found["half_ddp"][0]["losses"]
    decided_alike(found["half_fsdp2"])
    half, whole = "torch.bfloat16", "torch.float32"
    assert found["half_ddp"][1]["ran_in"] == dict.fromkeys(("norm", "batch", "first", "last"), whole)
    assert found["half_fsdp2"][1]["ran_in"] == {"norm": half, "batch": whole, "first": half, "last": whole}


# -- parts of it, in this process --------------------------------------------------------------------------------------


def test_every_sample_counts_once_and_no_rank_is_idle():
    for count in range(1, 9):
        shares = [share_of(count, rank, 3) for rank in range(3)]
        counted = [number for share, counts in shares if counts for number in range(count)[share]]
        assert counted == list(range(count))
        assert all(len(range(count)[share]) >= 1 for share, _ in shares)


def test_all_ranks_take_as_many_micro_batches():
    """A rank of a split model that ran forward once more would wait for the others for ever."""
    config = TrainConfig(model=TwoLinear, batch_size=BATCH)
    for size in (2, 3):
        feeders = [Feeder(blobs(37, 0), config, "cpu", rank=rank, world_size=size) for rank in range(size)]
        for batches in zip(*(feeder.epoch() for feeder in feeders), strict=True):
            assert len({len(list(batch.micro_batches(3))) for batch in batches}) == 1


def test_one_rank_needs_no_process_group():
    with together(TrainConfig(model=TwoLinear), "cpu") as ranks:
        assert ranks is ALONE
        assert not torch.distributed.is_initialized()


def test_ranks_that_cannot_be_divided_are_refused_before_they_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = TrainConfig(model=TwoLinear, parallel=BY_TENSOR)
    with pytest.raises(ConfigError, match="does not divide the number of ranks, 3"), together(config, "cpu"):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 2, "tensor_plan": {"a": "colwise"}}, "goes with strategy 'fsdp2'"),
        ({"strategy": "fsdp2", "tensor_parallel": 2}, "go together"),
        ({"strategy": "fsdp2", "tensor_plan": {"a": "rowwise"}}, "go together"),
        ({"shard_modules": ["a"]}, "goes with strategy 'fsdp2'"),
    ],
)
def test_fields_that_mean_nothing_alone_are_refused(fields, message):
    config = TrainConfig(model=TwoLinear, parallel=fields)
    with pytest.raises(ConfigError, match=message), together(config, "cpu"):
        pass


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"precision_schedule": {"fp32_steps": 3}}, "precision_schedule"),
        ({"evaluate_in": "fp32"}, "evaluate_in"),
        ({"gradient_threshold": {"kind": "quantile", "value": 0.1}}, "gradient_threshold"),
    ],
)
def test_what_a_split_model_cannot_do_is_said(fields, names):
    split = Ranks(mesh="any")
    config = TrainConfig(model=TwoLinear, parallel={"strategy": "fsdp2"}, **fields)
    with pytest.raises(ConfigError, match=names):
        check(config, choice_of("bf16"), split)
    check(config, choice_of("bf16"), ALONE)


def test_synchronised_batchnorm_is_refused_on_a_cpu():
    config = TrainConfig(model=TwoLinear, parallel={"sync_batchnorm": True})
    with pytest.raises(UnavailableError, match="CUDA"):
        check(config, choice_of("fp32"), Ranks(0, 2, 0, 2))


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_norm_of_gradients_is_torchs(max_norm):
    models = [nn.Linear(4, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(torch.ones(2, 4)).sum().backward()
    grads = [item.grad.clone() for item in models[0].parameters()]
    found = gradient_norm(models[0].parameters(), max_norm)
    assert float(found) == float(nn.utils.get_total_norm(grads))
    if max_norm is not None:
        nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    assert float(gradient_norm([], max_norm)) == 0


def test_a_lone_rank_trains_through_ranks_as_without(tmp_path):
    """`ranks` has a default; the answer is the same to the last bit."""
    runs = []
    for name, fields in (("a", {}), ("b", {"ranks": Ranks()})):
        (tmp_path / name).mkdir()
        config = TrainConfig(model=TwoLinear, epochs=1, batch_size=BATCH)
        runs.append(
            train(
                config,
                choice_of("fp32"),
                blobs(64, 0),
                blobs(16, 1000),
                state_path=tmp_path / name / "state.pt",
                state_key="k",
                progress=lambda *_: None,
                **fields,
            )
        )
    assert runs[0].history[0]["loss"] == runs[1].history[0]["loss"]
