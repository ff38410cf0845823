"""Agreement of predictions with labels that no sums can tell; on the host, of all of an evaluation at once.

All take numbers [n] twice, and are NaN where they are not defined: fewer than two numbers, or no variance.
"""

from collections.abc import Mapping

import numpy as np

from rmjax.evaluate.calibration import BINS, bins_of, ece


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal numbers sharing theirs."""
    from scipy.stats import rankdata  # takes a second to import, which a run without it need not spend

    return pearson(rankdata(x), rankdata(y))


def quadratic_kappa(x: np.ndarray, y: np.ndarray) -> float:
    """Cohen's kappa with quadratic weights (Cohen 1968) of ratings that are whole numbers.

    Of ratings x and y it is 1 - E (x - y)^2 / E (x - y')^2, where y' are the ratings y in an order of their own: the
    second expectation is Var x + Var y + (E x - E y)^2.
    """
    if len(x) < 2:
        return float("nan")
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    by_chance = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(1 - np.mean((x - y) ** 2) / by_chance) if by_chance else float("nan")


QUANTILES = (5, 25, 50, 75, 95)  # percent


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Quantiles of numbers [n], as "chosen_p05": how a distribution moves while a model is trained. {} of none."""
    if not len(values):
        return {}
    return {f"{name}_p{q:02}": float(x) for q, x in zip(QUANTILES, np.quantile(values, [q / 100 for q in QUANTILES]))}


def calibration_error(outcomes: Mapping[str, np.ndarray], least: float = 0.5) -> dict[str, float]:
    """Expected calibration error; see evaluation/calibration.py.

    Args:
        outcomes: float [n] each: `confidence`, from `least` to 1; `right`, 1 where what it is confident of is so, 0
            where not; `weight`. NaN where there is nothing.
        least: lower end of the first bin.

    Returns:
        {"ece": ...}; {} of nothing.
    """
    here = ~np.isnan(outcomes["confidence"])
    confidence, right, weight = (outcomes[name][here].astype(np.float64) for name in ("confidence", "right", "weight"))
    if not weight.sum():
        return {}
    sums = [np.bincount(bins_of(confidence, least), x, BINS) for x in (weight * (confidence - right), weight)]
    return {"ece": float(ece(np.concatenate(sums)))}


def with_reward_std(values: dict[str, float]) -> dict[str, float]:
    """Puts `reward_std` in the place of `reward_square`, the mean square, where it was measured."""
    values = dict(values)
    square = values.pop("reward_square", None)
    if square is not None:
        values["reward_std"] = max(square - values["reward_mean"] ** 2, 0.0) ** 0.5
    return values
