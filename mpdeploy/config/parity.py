"""The section `train.parity`: how far it is proven that mixed precision trains to the same model as FP32."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

from pydantic import Field, model_validator

from mpdeploy.config.section import Section


class ParityConfig(Section):
    """How far "AMP equals FP32" is proven, cheapest first.

    Each paired seed trains twice, in mixed precision and in FP32, from the same initial weights and in the same order; the pair of
    `train.seed` is trained anyway. Held-out losses and predictions are those of the calibration split, which training never sees: the
    gate's samples are seen by gates alone, and early stopping's have chosen weights.
    """

    tier: Literal[0, 1, 2] = 0
    """0: gradients of two steps on one batch. 1: also `seeds` paired trainings. 2: also `more_seeds`, while the verdict is open."""
    seeds: int = Field(3, ge=3)
    """Paired seeds of tier 1: `train.seed` and those after it."""
    more_seeds: tuple[int, ...] = (5, 10)
    """Tier 2: how many seeds there are at each further look. The error of 5 % is split over all looks."""

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at which it is looked; empty at tier 0."""
        return () if self.tier == 0 else (self.seeds,) if self.tier == 1 else (self.seeds, *self.more_seeds)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        looks = (self.seeds, *self.more_seeds)
        if any(one >= other for one, other in pairwise(looks)):
            raise ValueError(f"more_seeds must rise from above seeds={self.seeds}, found {self.more_seeds}")
        return self
