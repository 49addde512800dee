"""Run by test_killed.py: trains with everything that has a state, kills itself again and again, and compares the weights at the end.

Children are forked, so that torch is imported once. Prints one JSON object a line and kind of training: which
kills there were and whether the weights are equal.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from small_training import Mlp, blobs, choice_of, same
from torch import nn

from mpdeploy.config import TrainConfig
from mpdeploy.train.checkpoint import load_state, load_weights, save_weights
from mpdeploy.train.loop import train

STEPS_AN_EPOCH, EPOCHS = 5, 4


def augment(inputs, generator):
    noise = torch.randn(inputs.shape, generator=generator) + float(np.random.rand()) + random.random()
    return inputs + 0.05 * noise


def augment_from_its_generator(inputs, generator):
    return inputs + 0.05 * torch.randn(inputs.shape, generator=generator)


def loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels) * 64  # overflows FP16 until the scale came down


def config_of(kind: str) -> TrainConfig:
    return TrainConfig(
        model=Mlp, loss=loss, epochs=EPOCHS, batch_size=20, learning_rate=1e-2, accumulation=3,
        augment=augment if kind == "global" else augment_from_its_generator,
        prefetch=2 if kind == "prefetched" else 0,
        average={"decay": 0.9}, checkpoint_every_steps=2 if kind == "global" else 3, ship="best",
        precision_schedule={"fp32_until_settled": True, "settle_window": 2, "settle_drop": 0.9, "fp32_steps": 4},
        health={"first_step": 3, "sample_every": 4, "shadow_every": 5},
    )  # fmt: skip


def fit(folder: Path, kind: str, progress) -> None:
    folder.mkdir(exist_ok=True)
    run = train(
        config_of(kind), choice_of("fp16"), blobs(96, 0), blobs(40, 1000),
        state_path=folder / "state.pt", state_key="key", progress=progress,
    )  # fmt: skip
    save_weights(run.model, folder / "weights.safetensors")


def forked(work) -> int:
    """Run `work` in a child; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, folder: Path, kind: str) -> int:
    """The same, killed from outside, wherever it is by then."""
    child = os.fork()
    if child == 0:
        fit(folder, kind, lambda *_: time.sleep(0.01))
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(step: int):
    def progress(done, total, text):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def main(folder: Path, kind: str, seed: int) -> None:
    folder.mkdir()
    chosen = random.Random(seed)
    whole, broken = folder / "whole", folder / "broken"
    fit(whole, kind, lambda *_: None)  # here: what torch imports at the first step is imported once for all children
    deaths = []
    for step in sorted(chosen.sample(range(1, STEPS_AN_EPOCH * EPOCHS + 1), 3)):
        deaths.append(forked(lambda step=step: fit(broken, kind, kill_at(step))))
    for _ in range(2):
        deaths.append(killed_after(chosen.uniform(0.02, 0.3), broken, kind))
    first = broken / "first"
    assert forked(lambda: fit(broken, kind, lambda done, *_: first.exists() or first.write_text(str(done)))) == 0
    starts = int(first.read_text()) if first.exists() else None
    states = [load_state(path / "state.pt") for path in (whole, broken)]
    models = [Mlp(), Mlp()]
    for model, path in zip(models, (whole, broken), strict=True):
        load_weights(model, path / "weights.safetensors")
    print(
        json.dumps(
            {
                "deaths": deaths,
                "kind": kind,
                "last_start": starts,
                "shipped_equal": same(models[0].state_dict(), models[1].state_dict()),
                "last_equal": same(states[0]["model"], states[1]["model"]),
                "average_equal": same(states[0]["average"], states[1]["average"]),
                "scaler_equal": states[0]["scaler"] == states[1]["scaler"],
                "events": states[1]["precision"]["events"],
                "events_equal": states[0]["precision"] == states[1]["precision"],
                "skipped": states[1]["result"]["skipped_steps"],
                "norms_equal": str(states[0]["result"]["gradient_norms"]) == str(states[1]["result"]["gradient_norms"]),
                "shadows_equal": states[0]["watch"]["shadows"] == states[1]["watch"]["shadows"],
                "logged": [json.loads(line)["step"] for line in (broken / "log.jsonl").read_text().splitlines()],
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("global", "prefetched"):
        main(Path(sys.argv[1]) / name, name, int(sys.argv[2]))
