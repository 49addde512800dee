"""Pruning: which weights go, when, and that zeros survive optimiser steps, a kill, and the way to ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_training import BATCH, NUM_TRAIN, Mlp, blobs, choice_of, same, weights_of
from torch import nn

from mpdeploy.config import PruningConfig, TrainConfig
from mpdeploy.errors import ConfigError
from mpdeploy.train.loop import make_model, train
from mpdeploy.train.pruning import (
    MASK,
    fine_tuning,
    is_2_4,
    mask_of,
    masked_models,
    pruned_layers,
    remove_masks,
    sizes,
    sparsity_at,
)

STEPS_AN_EPOCH = NUM_TRAIN // BATCH


class Interrupted(BaseException):
    """Stands for a kill."""


# -- masks -------------------------------------------------------------------------------------------------------------


def test_unstructured_takes_the_smallest_magnitudes_whatever_their_sign():
    weight = torch.tensor([[1.0, -0.1, 3.0, -4.0], [0.2, -5.0, 0.3, 6.0]])
    assert mask_of(weight, "unstructured", 0.375).tolist() == [[True, False, True, True], [False, True, False, True]]


def test_channels_takes_whole_outputs_and_never_all_of_them():
    weight = torch.tensor([[1.0, 1.0], [0.1, 0.1], [3.0, 0.0]])
    assert mask_of(weight, "channels", 0.34).tolist() == [[True, True], [False, False], [True, True]]
    assert mask_of(weight, "channels", 0.99).any(dim=1).tolist() == [False, False, True]


def test_2_4_leaves_two_of_each_four_neighbouring_inputs():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.2, -0.4, 0.3]])
    assert mask_of(weight, "2:4", 0.5).tolist() == [[False, True, False, True, False, False, True, True]]


def test_2_4_of_a_convolution_runs_along_its_input_channels():
    """At each output channel and each position of the kernel, as TensorRT wants it for weights [K, C, R, S]."""
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    sparse = weight * mask_of(weight, "2:4", 0.5)
    for k in range(6):
        for r in range(3):
            for s in range(3):
                for c in range(0, 8, 4):
                    kept = sparse[k, c : c + 4, r, s]
                    assert int((kept != 0).sum()) == 2
                    assert kept.abs().max() == weight[k, c : c + 4, r, s].abs().max()
    assert is_2_4(sparse)
    assert not is_2_4(weight)
    assert not is_2_4(sparse.transpose(0, 1).contiguous())


def test_on_its_way_to_2_4_only_the_two_smallest_of_a_group_may_go():
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4, 1.0, 2.0, 3.0, 4.0]])
    assert mask_of(weight, "2:4", 0.375).tolist() == [[False, False, True, True, False, True, True, True]]


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (25, 0.5 * (1 - 0.5**3)), (50, 0.5), (99, 0.5)])
def test_sparsity_rises_by_a_cubic_curve_and_stays(step, share):
    config = PruningConfig(method="unstructured", sparsity=0.5, ramp=0.5)
    assert sparsity_at(config, step, 100) == pytest.approx(share)


def test_layers_are_chosen_by_kind_name_and_whether_2_4_fits():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
    assert list(pruned_layers(model, PruningConfig(method="unstructured"))) == ["0", "1", "2"]
    assert list(pruned_layers(model, PruningConfig(method="unstructured", dense=("0", "2")))) == ["1"]
    assert list(pruned_layers(model, PruningConfig(method="2:4"))) == ["1"]
    with pytest.raises(ConfigError, match="no layer of the model can be pruned so"):
        pruned_layers(model, PruningConfig(method="2:4", dense=("*",)))


def test_2_4_has_one_sparsity():
    with pytest.raises(ValueError, match=r"sparsity is 0\.5, found 0\.7"):
        PruningConfig(method="2:4", sparsity=0.7)


# -- training ----------------------------------------------------------------------------------------------------------


def dense_model() -> nn.Module:
    torch.manual_seed(3)
    return Mlp()


def prune(folder: Path, *, stop_at: int | None = None, epochs: int = 4, precision: str = "bf16", **fields) -> nn.Module:
    """Fine-tune with masks; `stop_at` interrupts after that step, as a kill would."""
    pruning = PruningConfig(
        **{"method": "unstructured", "sparsity": 0.75, "epochs": epochs, "update_every": 2, **fields}
    )
    config = TrainConfig(model=Mlp, batch_size=BATCH, learning_rate=1e-2, checkpoint_every_steps=1, pruning=pruning)

    def progress(done: int, total: int, text: str) -> None:
        if done == stop_at:
            raise Interrupted

    with masked_models(pruning, STEPS_AN_EPOCH * epochs, lambda: copy.deepcopy(dense_model())) as model:
        run = train(
            fine_tuning(config, model), choice_of(precision), blobs(NUM_TRAIN, 0), blobs(40, 1000),
            state_path=folder / "state.pt", state_key="key", progress=progress,
        )  # fmt: skip
    assert any(MASK in module._buffers for module in run.model.modules())
    return remove_masks(run.model)


@pytest.mark.parametrize("method", ["unstructured", "channels", "2:4"])
def test_what_is_pruned_is_zero_after_training_and_the_rest_has_moved(tmp_path, method):
    share = 0.5 if method == "2:4" else 0.75
    model = prune(tmp_path, method=method, sparsity=share)
    for name, layer in pruned_layers(model, PruningConfig(method=method)).items():
        zeros = float((layer.weight == 0).float().mean())
        assert zeros == pytest.approx(share), name
        before = dict(dense_model().named_modules())[name].weight
        assert not torch.equal(layer.weight[layer.weight != 0], before[layer.weight != 0])
        assert method != "2:4" or is_2_4(layer.weight)
    if method == "channels":
        silent = (model.first.weight == 0).all(dim=1)
        assert int(silent.sum()) == 24
        assert (model.first.bias[silent] == 0).all()


def test_the_pruned_model_has_the_names_and_shapes_of_the_dense_one(tmp_path):
    pruned, dense = weights_of(prune(tmp_path)), weights_of(Mlp())
    assert {name: value.shape for name, value in pruned.items()} == {name: value.shape for name, value in dense.items()}


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_killed_fine_tuning_goes_on_to_the_same_zeros_and_weights(tmp_path, step):
    whole = weights_of(prune(tmp_path / "whole"))
    with pytest.raises(Interrupted):
        prune(tmp_path / "killed", stop_at=step)
    assert same(weights_of(prune(tmp_path / "killed")), whole)


def test_models_outside_the_block_are_left_alone(tmp_path):
    prune(tmp_path)
    model = Mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()
    assert all((value != 0).any() for value in model.parameters())
    assert not any(MASK in module._buffers for module in model.modules())


def test_the_moving_average_ships_with_the_same_zeros(tmp_path):
    pruning = PruningConfig(method="unstructured", sparsity=0.75, epochs=4, update_every=2)
    config = TrainConfig(model=Mlp, batch_size=BATCH, learning_rate=1e-2, pruning=pruning, average={"decay": 0.9})
    with masked_models(pruning, STEPS_AN_EPOCH * 4, dense_model) as model:
        run = train(
            fine_tuning(config, model), choice_of("fp32"), blobs(NUM_TRAIN, 0), blobs(40, 1000),
            state_path=tmp_path / "state.pt", state_key="key", progress=lambda done, total, text: None,
        )  # fmt: skip
    assert run.averaged
    found = remove_masks(run.model)
    assert float((found.first.weight == 0).float().mean()) == pytest.approx(0.75)


def test_sizes_are_counted_dense_gzipped_and_sparse():
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.mul_(mask_of(model.weight, "unstructured", 0.75))
    found = sizes(model)
    assert found["dense_bytes"] == 64 * 64 * 4
    assert found["sparse_bytes"] == 64 * 64 + 64 * 64 // 8
    assert found["zeros"] == 0.75
    assert found["gzip_bytes"] < 0.45 * found["dense_bytes"]


def test_the_exported_weights_are_2_4_along_the_input_channels_even_behind_a_folded_batch_norm(tmp_path):
    from mpdeploy.export.to_onnx import export_onnx

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4, 10)
    ).eval()
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.mul_(mask_of(layer.weight, "2:4", 0.5))
        model[1].weight.uniform_(0.5, 2)
    path = tmp_path / "model.onnx"
    samples = np.random.default_rng(0).normal(size=(4, 8, 4, 4)).astype(np.float32)
    export_onnx(model, {"x": samples}, path, opset=20, output_names=["logits"])
    graph = onnx.load(path).graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer if len(item.dims) > 1}
    assert len(weights) == 2
    for name, value in weights.items():
        assert is_2_4(torch.from_numpy(value.copy())), name
        assert (value == 0).mean() == 0.5


def test_make_model_puts_a_masked_model_on_its_device_as_any_other():
    pruning = PruningConfig(method="unstructured")
    with masked_models(pruning, 10, dense_model) as model:
        made = make_model(TrainConfig(model=model), "cpu")
    assert MASK in made.first._buffers
