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
    """Which matrices Spectrum trains: module types over layers, colour by rank within the type."""
    import re

    kinds = list(dict.fromkeys(row["type"] for row in table))
    layers = 1 + max(int(re.findall(r"\.(\d+)\.", row["module"])[0]) for row in table)
    ranks = [[float("nan")] * layers for _ in kinds]
    chosen: list[tuple[int, int]] = []
    for kind_number, kind in enumerate(kinds):
        own = sorted((row for row in table if row["type"] == kind), key=lambda row: row["snr"])
        for rank, row in enumerate(own):
            layer = int(re.findall(r"\.(\d+)\.", row["module"])[0])
            ranks[kind_number][layer] = (rank + 1) / len(own)
            if row["selected"]:
                chosen.append((layer, kind_number))
    figure, axes = _figure(height=0.8 + 0.32 * len(kinds))
    axes.imshow(ranks, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.scatter(*zip(*chosen, strict=True), s=14, color="#d1495b", label="trained")
    axes.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds)
    axes.set_title("signal-to-noise rank within each module type (dark is high), red: trained", fontsize=8)
    figure.savefig(file)


def _figure(height: float = 3.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.spines["top"].set_visible(False)
    return figure, axes
