"""A small classifier of digits that trains on any number of ranks."""

from mpdeploy.config import DataConfig, ParallelConfig, Pipeline, TrainConfig
from mpdeploy.train.data import load_digits


def network():
    from torch import nn

    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def pipeline():
    return Pipeline(
        name="small",
        data=DataConfig(load=load_digits),
        train=TrainConfig(
            model=network,
            epochs=4,
            batch_size=64,  # of all ranks together
            learning_rate=5e-3,
            precision="fp16",
            cpu_precision="fp32",
            checkpoint_every_steps=20,
            parallel=ParallelConfig(strategy="ddp"),
        ),
    )
