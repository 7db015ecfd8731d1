"""95% intervals for scores of examples: Wilson's for shares, bootstrap percentiles for means. No models here."""

from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of the normal distribution
RUNS = 2000  # bootstrap samples
SEED = 0


def score_interval(scores: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean score: Wilson's if all are 0 or 1, else the bootstrap's; None without scores."""
    if not scores:
        return None
    if all(score in (0.0, 1.0) for score in scores):
        return wilson(int(sum(scores)), len(scores))
    return bootstrap(scores)


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share; unlike the normal one it is not empty at 0 or 1."""
    share, spread = successes / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentiles of the mean over resampled examples. Of paired differences it is the paired interval."""
    data = np.asarray(values, dtype=float)
    index = np.random.default_rng(SEED).integers(len(data), size=(RUNS, len(data)))
    low, high = np.quantile(data[index].mean(1), [0.025, 0.975])
    return float(low), float(high)
