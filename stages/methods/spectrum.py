"""Spectrum: full fine-tuning of the weight matrices with the highest signal-to-noise ratio.

Hartford et al., "Spectrum: Targeted Training on Signal to Noise Ratio", arXiv 2406.06623. The score is
that of the authors' code, which differs from the paper's text in two places: the noise scale is the
interquartile range of the singular values over 1.349, and the edge is taken without the factor sqrt(n).
For rectangular matrices that edge lies below the bulk of pure noise, so a high score does not say «much
signal»: hold a result against a control before you believe in the selection.
"""

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Annotated, Literal, cast

from pydantic import Field

from stages.errors import InvalidInput
from stages.methods.base import MethodSpec, Prepared, Start, train_only

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

GAUSSIAN_IQR = 1.349
"""Interquartile range of a standard normal distribution."""

_LAYER = re.compile(r"\.\d+\.")


class Spectrum(MethodSpec):
    """Train the top share of the weight matrices of each module type, by signal-to-noise ratio."""

    kind: Literal["spectrum"]
    top_percent: Annotated[float, Field(gt=0, le=100)] = 25.0
    """Share of the matrices of each module type that train, at least one; embeddings and norms never do."""

    def prepare(self, model: "PreTrainedModel", start: Start) -> Prepared:
        """Scan the model's matrices and unfreeze the selected ones."""
        scores = scan(model)
        selected = select(scores, self.top_percent)
        train_only(model, selected)
        chosen = {name: (kind, snr, name in selected) for name, (kind, snr) in scores.items()}
        table = [
            {"module": name.removesuffix(".weight"), "type": kind, "snr": snr, "selected": taken}
            for name, (kind, snr, taken) in chosen.items()
        ]
        return Prepared(model, selected, {"spectrum": table})

    def finish(self, model: "torch.nn.Module", start: Start) -> "PreTrainedModel":
        """Nothing to merge: the trained matrices are the model's own."""
        return cast("PreTrainedModel", model.float())


def signal_to_noise(singular_values: "torch.Tensor", shape: tuple[int, int]) -> float:
    """The reference score of one matrix from its singular values, in descending order.

    signal / noise / largest, where singular values above sigma * (1 + sqrt(beta)) are signal,
    sigma = IQR / 1.349 and beta = smaller / larger side; noise is 1 where no value lies below.
    """
    import torch

    values = singular_values.to(torch.float64)
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    sigma = float(quartiles[1] - quartiles[0]) / GAUSSIAN_IQR
    beta = min(shape) / max(shape)
    edge = sigma * (1 + beta**0.5)
    signal = float(values[values > edge].sum())
    noise = float(values[values <= edge].sum()) or 1.0
    largest = float(values[0])
    return signal / noise / largest if largest > 0 else 0.0


def scan(model: "torch.nn.Module") -> dict[str, tuple[str, float]]:
    """Score every weight matrix inside the numbered layers: parameter name -> (module type, score).

    Raises:
        InvalidInput: a matrix holds inf or nan, or the model has no numbered layers.
    """
    import torch

    scores: dict[str, tuple[str, float]] = {}
    for name, parameter in model.named_parameters():
        layer = _LAYER.search(name)
        if parameter.ndim != 2 or layer is None or not name.endswith(".weight"):
            continue
        matrix = parameter.detach().float()
        # LAPACK is several times slower on wide matrices, and a transpose has the same singular values.
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        if not bool(torch.isfinite(tall).all()):
            raise InvalidInput(f"{name} holds inf or nan: the start model is broken; train it again")
        values = torch.linalg.svdvals(tall)
        kind = name[layer.end() :].removesuffix(".weight")
        scores[name] = (kind, signal_to_noise(values, (matrix.shape[0], matrix.shape[1])))
    if not scores:
        raise InvalidInput("method spectrum found no weight matrices in numbered layers; use method full")
    return scores


def select(scores: dict[str, tuple[str, float]], top_percent: float) -> frozenset[str]:
    """The names with the highest scores of each module type: int(n * percent / 100), at least one."""
    by_type: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, (kind, score) in scores.items():
        by_type[kind].append((score, name))
    chosen: set[str] = set()
    for ranked in by_type.values():
        ranked.sort(key=lambda pair: -pair[0])
        chosen.update(name for _, name in ranked[: max(1, int(len(ranked) * top_percent / 100))])
    return frozenset(chosen)
