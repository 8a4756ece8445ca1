"""Rank weight matrices by signal-to-noise ratio, as the reference does, and list those to unfreeze.

    python spectrum.py --spec spec.yaml --model BASE --output unfrozen.yaml

The formula and the choice per module type are the reference's (QuixiAI/spectrum). Its list always opens
with the embedding and the output head; they are left out here, as the spec's `spectrum` leaves them out.
"""

import re
from collections import defaultdict

import torch
import yaml
from settings import arguments, read_spec, stage_of
from transformers import AutoModelForCausalLM


def snr(weight: torch.Tensor) -> float:
    values = torch.linalg.svdvals(weight.float())
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.75]))
    sigma = (quartiles[1] - quartiles[0]) / 1.349
    beta = min(weight.shape) / max(weight.shape)
    threshold = sigma * (1 + beta**0.5)
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    return float(signal / (noise if noise > 0 else 1.0) / values[0])


def main() -> None:
    paths = arguments("model", "output")
    top_percent = stage_of(read_spec(paths.spec), "cpt")["method"].get("top_percent", 25)
    model = AutoModelForCausalLM.from_pretrained(paths.model, dtype=torch.float32)
    by_type: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, weight in model.named_parameters():
        layer = re.search(r"\.\d+\.", name)
        if layer and weight.ndim == 2:
            by_type[name[layer.end() :]].append((snr(weight.detach()), name))
    unfrozen = []
    for ranked in by_type.values():
        ranked.sort(key=lambda pair: -pair[0])
        unfrozen += [name for _, name in ranked[: max(1, int(len(ranked) * top_percent / 100))]]
    paths.output.write_text(yaml.safe_dump({"unfrozen_parameters": unfrozen}), encoding="utf-8")


if __name__ == "__main__":
    main()
