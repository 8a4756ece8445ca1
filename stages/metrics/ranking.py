"""One scale for all models of a chain, from pairwise comparisons: Bradley-Terry, shown as Elo, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ANCHOR = 1000.0
"""Elo of the first model, by definition."""
PER_UNIT = 400.0
"""400 points are odds of 10 to 1 (Elo 1978)."""
PRIOR = 0.5
"""Wins and losses that every compared pair is given beside its own: without them, who always won would be infinitely
better (the empirical logit; Haldane 1955, Anscombe 1956)."""
RESAMPLES = 1000
SEED = 20
_ROUNDS, _CLOSE = 500, 1e-9


@dataclass(frozen=True, slots=True)
class Comparison:
    """Points of one model against another, prompt by prompt: 1 won, 0.5 tied, 0 lost."""

    model: str
    other: str
    points: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A model's place on the scale."""

    model: str
    elo: float
    low: float
    high: float
    """Ends of the two-sided 95% interval of its distance from the first model, which has none."""
    strength: float
    """Of Bradley and Terry, in logits: the odds of a win against the first model are exp of it."""


def ranking(models: Sequence[str], comparisons: Sequence[Comparison]) -> tuple[Ranked, ...]:
    """Where each model stands (Bradley and Terry 1952), a tie being half a win for both.

    The intervals come from resampling prompts, the same ones in all comparisons that have as many: what is hard about
    a prompt is hard for every model.

    Args:
        models: the first one is the anchor; models that no comparison connects with it are left out.
        comparisons: each pair at most once.

    Returns:
        The models in the order given.
    """
    import numpy as np

    known = _connected(models, comparisons)
    if len(known) < 2:
        return ()
    own = [one for one in comparisons if one.model in known]
    places = {model: place for place, model in enumerate(known)}
    drawn = {len(one.points): _draws(len(one.points)) for one in own}
    wins = np.zeros((RESAMPLES + 1, len(known), len(known)))
    for one in own:
        points = np.asarray(one.points)
        count = len(points)
        won = np.concatenate([[points.sum()], drawn[count] @ points])
        model, other = places[one.model], places[one.other]
        wins[:, model, other] += won + PRIOR
        wins[:, other, model] += count - won + PRIOR
    strengths = _strengths(wins)
    scaled = ANCHOR + PER_UNIT / np.log(10) * strengths
    low, high = np.quantile(scaled[1:], (0.025, 0.975), axis=0)
    return tuple(
        Ranked(model, float(scaled[0, n]), float(low[n]), float(high[n]), float(strengths[0, n]))
        for n, model in enumerate(known)
    )


def _connected(models: Sequence[str], comparisons: Sequence[Comparison]) -> list[str]:
    """Those that comparisons lead to from the first one, in the order given."""
    reached = {models[0]} if models else set()
    while (
        new := {
            name
            for one in comparisons
            if one.points and len({one.model, one.other} & reached) == 1
            for name in (one.model, one.other)
        }
        - reached
    ):
        reached |= new
    return [model for model in models if model in reached]


def _draws(count: int) -> "NDArray[np.float64]":
    """How often each resample holds each prompt, of shape (resamples, prompts)."""
    import numpy as np

    draw = np.random.default_rng((SEED, count))
    return draw.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)


def _strengths(wins: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """The likeliest strengths, less the first one's, for many tables at once.

    Hunter 2004, «MM algorithms for generalized Bradley-Terry models», Annals of Statistics 32.

    Args:
        wins: of shape (tables, models, models): how often the row won against the column.
    """
    import numpy as np

    games = wins + wins.transpose(0, 2, 1)
    won = wins.sum(axis=2)
    scale = np.ones(won.shape)
    for _ in range(_ROUNDS):
        shared = scale[:, :, None] + scale[:, None, :]
        fresh = won / (games / shared).sum(axis=2)
        fresh /= np.exp(np.log(fresh).mean(axis=1, keepdims=True))
        done = np.abs(np.log(fresh / scale)).max() < _CLOSE
        scale = fresh
        if done:
            break
    strengths: NDArray[np.float64] = np.log(scale / scale[:, :1])
    return strengths
