"""Read what the four `lm_eval` calls found and write one table.

    python report.py --spec spec.yaml --evaluations FOLDER --output metrics.json

The harness has no reward accuracy, which needs two models, nor bits per byte of an answer; both follow from
the log-likelihoods that `--log_samples` keeps.
"""

import json
import math
from pathlib import Path
from typing import Any

from settings import arguments, read_jsonl, read_spec

NAMES = ("base", "cpt", "ift", "dpo")


def samples(folder: Path, name: str) -> list[dict[str, Any]]:
    (file,) = folder.glob(f"**/samples_{name}_*.jsonl")
    return sorted(read_jsonl(file), key=lambda sample: sample["doc_id"])


def log_likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(answer[0][0]) for answer in sample["resps"]]


def preference(found: list[dict], before: list[dict] | None, beta: float) -> dict[str, float]:
    ours = [log_likelihoods(sample) for sample in found]
    values = {"policy_accuracy": sum(chosen > rejected for chosen, rejected in ours) / len(ours)}
    if before is not None:
        start = [log_likelihoods(sample) for sample in before]
        margins = [beta * ((a - c) - (b - d)) for (a, b), (c, d) in zip(ours, start, strict=True)]
        values["reward_accuracy"] = sum(margin > 0 for margin in margins) / len(margins)
        values["reward_margin"] = sum(margins) / len(margins)
    return values


def main() -> None:
    paths = arguments("evaluations", "output")
    spec = read_spec(paths.spec)
    table: dict[str, dict[str, float]] = {}
    for number, step in enumerate(NAMES):
        here = paths.evaluations / step
        (file,) = here.glob("**/results_*.json")
        results = json.loads(file.read_text(encoding="utf-8"))["results"]
        row = table.setdefault(step, {})
        for name, metric in spec["metrics"].items():
            if metric["kind"] == "lm_eval":
                row[name] = results[name][f"{metric.get('metric', 'acc')},none"]
            elif "bits_per_byte,none" in results[name]:
                row[name] = results[name]["bits_per_byte,none"]
            elif metric["kind"] == "perplexity":
                found = samples(here, name)
                bits = -math.fsum(log_likelihoods(sample)[0] for sample in found) / math.log(2)
                row[name] = bits / sum(sample["doc"]["bytes"] for sample in found)
            else:
                before = samples(paths.evaluations / NAMES[number - 1], name) if number else None
                values = preference(samples(here, name), before, metric.get("beta", 0.1))
                row |= {f"{name}.{measure}": value for measure, value in values.items()}
    paths.output.write_text(json.dumps(table, indent=1), encoding="utf-8")
    for step, row in table.items():
        print(step, " ".join(f"{name}={value:.4f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
