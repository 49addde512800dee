"""Start the ranks with Ray Train: each of its workers runs `mpdeploy train-and-export` as one rank.

python ray_train.py PIPELINE RUN [--workers N] [--gpu]

RUN must lie where rank 0's machine can write it (and all machines, for FSDP2).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def one_rank(settings: dict[str, str]) -> None:
    """What a worker does. Ray's own process group stays idle: the rank is a process of its own, with a port of its own."""
    import ray.train

    worker = ray.train.get_context()
    launcher = {
        "RANK": str(worker.get_world_rank()),
        "LOCAL_RANK": str(worker.get_local_rank()),
        "WORLD_SIZE": str(worker.get_world_size()),
        "MASTER_ADDR": os.environ["MASTER_ADDR"],
        "MASTER_PORT": str(int(os.environ["MASTER_PORT"]) + 1),
    }
    command = [sys.executable, "-m", "mpdeploy", "train-and-export", settings["pipeline"], "--run", settings["run"]]
    code = subprocess.run(command, env=os.environ | launcher, cwd=settings["folder"], check=False).returncode
    if code == 10:
        print("a gate failed: see gate.json; training again would not change it", file=sys.stderr)
    elif code != 0:
        raise RuntimeError(f"rank {launcher['RANK']} ended with {code}")


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument("run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="one GPU a worker")
    chosen = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        one_rank,
        train_loop_config={"pipeline": chosen.pipeline, "run": chosen.run, "folder": str(Path.cwd())},
        torch_config=TorchConfig(backend="gloo"),  # it sets MASTER_ADDR; mpdeploy's ranks choose nccl themselves
        scaling_config=ScalingConfig(num_workers=chosen.workers, use_gpu=chosen.gpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
