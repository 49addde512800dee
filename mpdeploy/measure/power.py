"""How many samples a gate needs: power before a run, and what would decide an inconclusive one."""

from __future__ import annotations

import math

import numpy as np

from mpdeploy.measure.statistics import (
    CONFIDENCE,
    FloatArray,
    PairedCounts,
    normal_cdf,
    normal_quantile,
    tango_statistic,
)

POWER = 0.8
"""Probability of a decision that an announced number of samples has."""
MAX_SAMPLES = 10**9
"""Above this, more samples are no answer."""
_MAX_CELLS = 250_000  # of an enumeration: 20 ms; beyond, both counts exceed 1,000 and the normal approximation is good


def power_of_paired_binary(
    num_samples: int, margin: float, *, discordance: float, drop: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Probability that `num_samples` paired 0/1 scores pass a margin.

    Sums the trinomial distribution over all counts that pass (Tango's score test, and the exact one where nothing is
    gained); where those are too many to sum, the normal approximation, which is then as good.

    Args:
        num_samples: paired samples.
        margin: the largest drop allowed.
        discordance: share of samples that exactly one of the two models has right.
        drop: the true drop; at most `discordance`.
        confidence: of the bound that decides.
    """
    share_lost, share_gained = (discordance + drop) / 2.0, (discordance - drop) / 2.0
    lost = _likely_counts(num_samples, share_lost)
    gained = _likely_counts(num_samples, share_gained)
    if len(lost) * len(gained) > _MAX_CELLS:
        deviation = math.sqrt(max(discordance - drop * drop, 0.0) / num_samples)
        return normal_cdf((margin - drop) / deviation - normal_quantile(confidence))
    from scipy.special import bdtr, gammaln

    grid_lost, grid_gained = lost[:, None], gained[None, :]
    rest = num_samples - grid_lost - grid_gained
    log_share = (
        gammaln(num_samples + 1.0)
        - gammaln(grid_lost + 1)
        - gammaln(grid_gained + 1)
        - gammaln(np.maximum(rest, 0) + 1)
    )
    for counts, share in (
        (grid_lost, share_lost),
        (grid_gained, share_gained),
        (np.maximum(rest, 0), 1.0 - discordance),
    ):
        log_share = log_share + (counts * math.log(share) if share > 0.0 else np.where(counts == 0, 0.0, -np.inf))
    passes = tango_statistic(grid_lost, grid_gained, num_samples, margin) < -normal_quantile(confidence)
    passes &= (grid_gained > 0) | (np.asarray(bdtr(grid_lost, num_samples, margin)) < 1.0 - confidence)
    return min(1.0, float(np.exp(np.where((rest >= 0) & passes, log_share, -np.inf)).sum()))


TYPICAL_DISCORDANCE = 0.01
"""Share of samples that a half model and its FP32 one decide differently, where nothing better is known."""


def power_sentence(num_samples: int, margin: float, *, discordance: float = TYPICAL_DISCORDANCE) -> str:
    """What so many paired 0/1 scores can decide against a margin, for people, before a run."""
    power = power_of_paired_binary(num_samples, margin, discordance=discordance)
    needed = samples_for_margin(margin, discordance=discordance)
    text = (
        f"{num_samples:,} samples pass an equally good model against a margin of {100.0 * margin:g} pt with "
        f"{100.0 * power:.0f} % probability where the two differ on {100.0 * discordance:g} % of them"
    )
    if power < POWER and needed is not None:
        text += f"; {needed:,} samples would with {100.0 * POWER:.0f} %"
    return text


def _likely_counts(num_samples: int, share: float) -> FloatArray:
    """Counts that occur with a probability worth adding, as floats."""
    mean = num_samples * share
    reach = 7.0 * math.sqrt(mean) + 12.0 if share > 0.0 else 0.0
    return np.arange(max(0, math.floor(mean - reach)), min(num_samples, math.ceil(mean + reach)) + 1, dtype=np.float64)


def samples_for_margin(
    margin: float, *, discordance: float, power: float = POWER, confidence: float = CONFIDENCE
) -> int | None:
    """How many paired 0/1 scores an equally good model needs to pass a margin, given how often the two models differ.

    None where no number that anyone has would do.
    """
    if discordance <= 0.0:
        return math.ceil(math.log(1.0 - confidence) / math.log1p(-margin))
    return _refined(margin, discordance, 0.0, power, confidence)


def samples_to_decide_binary(counts: PairedCounts, margin: float, *, power: float = POWER) -> int | None:
    """How many samples would decide, with probability `power`, if the shares lost and gained stay what they are.

    None where no number that anyone has would: the drop lies on the margin.
    """
    if counts.num_samples < 1 or margin <= 0.0:
        return None
    if counts.num_discordant == 0:
        return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-min(margin, 0.999)))
    discordance, drop = counts.num_discordant / counts.num_samples, counts.drop
    if drop < margin:
        return _refined(margin, discordance, drop, power, CONFIDENCE)
    return _normal(margin, drop, discordance - drop * drop, power)


def samples_to_decide_mean(drop: float, deviation: float, margin: float, *, power: float = POWER) -> int | None:
    """The same for scores of any kind, from the standard deviation of one sample's drop."""
    return _normal(margin, drop, deviation * deviation, power)


def _normal(margin: float, drop: float, variance: float, power: float, confidence: float = CONFIDENCE) -> int | None:
    distance = abs(margin - drop)
    if distance == 0.0 or not math.isfinite(distance) or not math.isfinite(variance):
        return None
    z = normal_quantile(confidence) + normal_quantile(power)
    count = (z / distance) ** 2 * max(variance, 0.0)
    return max(2, math.ceil(count)) if count <= MAX_SAMPLES else None


def _refined(margin: float, discordance: float, drop: float, power: float, confidence: float) -> int | None:
    """The smallest count, to 2 %, whose exact power reaches `power`; bisection from the normal approximation."""
    start = _normal(margin, drop, discordance - drop * drop, power, confidence)
    if start is None:
        return None

    def enough(count: int) -> bool:
        return power_of_paired_binary(count, margin, discordance=discordance, drop=drop, confidence=confidence) >= power

    low, high = max(1, start // 4), start
    while not enough(high):
        low, high = high, 2 * high
        if high > MAX_SAMPLES:
            return None
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
