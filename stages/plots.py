"""Pictures of a stage, as PNG files in its artifact."""

from pathlib import Path
from typing import Any

LOSS = "loss.png"
SPECTRUM = "spectrum.png"


def draw_loss(curve: list[dict[str, Any]], file: Path) -> None:
    """Training loss and learning rate over the steps."""
    figure, axes = _figure()
    steps = [entry["step"] for entry in curve]
    axes.plot(steps, [entry["loss"] for entry in curve], color="#1f6f8b")
    axes.set(xlabel="step", ylabel="training loss")
    rates = axes.twinx()
    rates.plot(steps, [entry["learning_rate"] for entry in curve], color="#b0b0b0", linewidth=1)
    rates.set_ylabel("learning rate", color="#808080")
    rates.spines["top"].set_visible(False)
    figure.savefig(file)


def draw_spectrum(table: list[dict[str, Any]], file: Path) -> None:
    """Which matrices Spectrum trains: module types over layers, colour by rank within the type.

    Args:
        table: a row for each matrix with ``type``, ``layer``, ``rank`` (1 is best) and ``selected``; of the experts
            of a layer the best one shows.
        file: the PNG to write.
    """
    kinds = list(dict.fromkeys(row["type"] for row in table))
    sizes = {kind: sum(row["type"] == kind for row in table) for kind in kinds}
    layers = 1 + max(row["layer"] for row in table)
    shades = [[float("nan")] * layers for _ in kinds]
    for row in sorted(table, key=lambda row: -row["rank"]):
        shades[kinds.index(row["type"])][row["layer"]] = 1 - (row["rank"] - 1) / sizes[row["type"]]
    chosen = sorted({(row["layer"], kinds.index(row["type"])) for row in table if row["selected"]})
    figure, axes = _figure(height=0.8 + 0.32 * len(kinds))
    axes.imshow(shades, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.scatter([layer for layer, _ in chosen], [kind for _, kind in chosen], s=14, color="#d1495b")
    axes.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
    axes.set_title("rank by score within each module type (dark is high), red: selected", fontsize=8)
    figure.savefig(file)


def _figure(height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines["top"].set_visible(False)
    return figure, axes
