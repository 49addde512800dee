"""Checkpoints: FP32 safetensors, states without code, and a full disk that is called by its name."""

from __future__ import annotations

import subprocess

import pytest
import torch
from small_training import Mlp, same, weights_of
from torch import nn

from mpdeploy.errors import StageFailedError
from mpdeploy.train.checkpoint import load_state, load_weights, save_state, save_weights


def test_weights_read_back_to_the_last_bit(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_weights(model, tmp_path / "w.safetensors", metadata={"precision": "bf16"})
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_weights(other, tmp_path / "w.safetensors")
    assert same(weights_of(model), weights_of(other))


def test_the_file_says_what_the_weights_were_trained_in(tmp_path):
    from safetensors import safe_open

    save_weights(Mlp(), tmp_path / "w.safetensors", metadata={"precision": "bf16"})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"precision": "bf16"}


def test_the_same_weights_make_the_same_bytes(tmp_path):
    model = Mlp()
    for name in ("a", "b"):
        save_weights(model, tmp_path / name, metadata={"precision": "bf16"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_checkpoint_can_be_read_by_others(tmp_path):
    save_weights(Mlp(), tmp_path / "w.safetensors")
    save_state({}, tmp_path / "s.pt")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}


def test_tensors_that_share_memory_or_are_laid_out_otherwise_are_saved_whole(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    model[1].weight = model[0].weight
    model = model.to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "w.safetensors")
    before = weights_of(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(weights_of(model), before)


def test_weights_of_another_model_are_refused(tmp_path):
    save_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")
    with pytest.raises(StageFailedError, match="does not fit the model") as caught:
        load_weights(nn.Linear(3, 5), tmp_path / "w.safetensors")
    assert "train again" in (caught.value.hint or "")


def test_a_state_that_is_not_there_is_none(tmp_path):
    assert load_state(tmp_path / "none.pt") is None


def test_a_state_that_would_run_code_is_not_read(tmp_path):
    torch.save({"key": "k", "model": Mlp()}, tmp_path / "s.pt")
    assert load_state(tmp_path / "s.pt") is None


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("what", ["weights", "state"])
def test_a_full_disk_is_called_by_its_name_and_the_old_file_is_kept(small_disk, what):
    path = small_disk / "file"
    path.write_text("old")
    large = nn.Linear(200, 200)
    with pytest.raises(StageFailedError, match=f"Cannot write {path}: No space left on device") as caught:
        save_weights(large, path) if what == "weights" else save_state({"model": large.state_dict()}, path)
    assert "free some space" in (caught.value.hint or "")
    assert [(item.name, item.read_text()) for item in small_disk.iterdir()] == [("file", "old")]
