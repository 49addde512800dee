"""What a labelling of units costs, and what each unit alone would change: units in FP32, and the casts between them and half ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from mpdeploy.precision.borders import CAST_BYTES
from mpdeploy.precision.flow import Flow

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Prices:
    """Prices of a flow's labellings; nothing is planned around them, exactly these units are half.

    Args:
        flow: units and edges.
        units: key -> price of FP32; units that rules keep FP32 have none.
        cast: factor on the bytes that casts move.
    """

    def __init__(self, flow: Flow, units: Mapping[str, float], cast: float) -> None:
        self._keys = [unit.key for unit in flow.units]
        self._units = np.array([units.get(key, 0.0) for key in self._keys])
        edges = flow.edges if cast else []
        self._sizes = np.array([cast * CAST_BYTES * edge.size for edge in edges])
        self._makers = np.array([edge.producer for edge in edges], dtype=np.intp)
        self._makes_float = np.array([edge.always_float for edge in edges], dtype=bool)
        self._takes_float = np.array([edge.float_consumers for edge in edges], dtype=bool)
        pairs = [(number, taker) for number, edge in enumerate(edges) for taker in dict.fromkeys(edge.consumers)]
        self._taken = np.array([edge for edge, _ in pairs], dtype=np.intp)
        self._takers = np.array([taker for _, taker in pairs], dtype=np.intp)
        self._num_takers = np.bincount(self._taken, minlength=len(edges))

    def cost(self, half: Collection[str]) -> float:
        """Of a labelling."""
        is_half = self._mask(half)
        crossing = self._crossing(self._makes_half(is_half), self._half_takers(is_half))
        return float(self._units[~is_half].sum() + self._sizes[crossing].sum())

    def changes(self, half: Collection[str]) -> dict[str, float]:
        """Unit -> what the cost changes by when it alone changes sides."""
        is_half = self._mask(half)
        found = np.where(is_half, self._units, -self._units)
        if len(self._sizes):
            makes, takers = self._makes_half(is_half), self._half_takers(is_half)
            now = self._crossing(makes, takers).astype(np.float64)
            other = ~is_half[self._makers] & ~self._makes_float
            by_maker = self._sizes * (self._crossing(other, takers) - now)
            found += np.bincount(self._makers, weights=by_maker, minlength=len(found))
            fewer = np.where(is_half[self._takers], -1, 1)
            edges = self._taken
            after = self._crossing(makes[edges], takers[edges] + fewer, edges)
            by_taker = self._sizes[edges] * (after - now[edges])
            found += np.bincount(self._takers, weights=by_taker, minlength=len(found))
        return dict(zip(self._keys, found.tolist(), strict=True))

    def _mask(self, half: Collection[str]) -> Bools:
        return np.array([key in half for key in self._keys], dtype=bool)

    def _makes_half(self, is_half: Bools) -> Bools:
        return np.asarray(is_half[self._makers] & ~self._makes_float)

    def _half_takers(self, is_half: Bools) -> NDArray[np.int64]:
        return np.bincount(self._taken[is_half[self._takers]], minlength=len(self._sizes))

    def _crossing(
        self, makes: Bools, takers: NDArray[np.int64], edges: NDArray[np.intp] | slice = slice(None)
    ) -> Bools:
        """Whether a tensor is cast: it is made half and someone takes it as FP32, or the other way round."""
        float_takers = self._takes_float[edges] | (takers < self._num_takers[edges])
        return np.asarray(np.where(makes, float_takers, takers > 0))
