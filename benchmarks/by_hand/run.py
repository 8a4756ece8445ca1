"""The whole chain by hand, one process after the other, and what each of them cost.

    python run.py --spec spec.yaml --output FOLDER

The base is a plain checkpoint (`model.path` in the spec). Writes `phases.json` and `metrics.json`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from settings import SEQUENCE_LENGTH, arguments, read_spec

HERE = Path(__file__).parent
EXPECTED = [("cpt", "spectrum"), ("ift", "lora"), ("dpo", "qlora")]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Recorder:
    """Runs commands and keeps the wall time, the CPU time and the peak memory of each."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.phases: list[dict[str, Any]] = []

    def run(self, name: str, command: list[str]) -> None:
        """Run one command to its end, its output in a log; stop everything if it fails."""
        log = self.logs / f"{len(self.phases):02}-{name.replace(' ', '-')}.log"
        started = time.monotonic()
        with log.open("wb") as file:
            child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | OFFLINE)
            # wait4 gives this child's own usage; getrusage would give that of all so far.
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - started
        if child.returncode:
            raise SystemExit(f"{name}: exit code {child.returncode}; {log}:\n{log.read_text(errors='replace')[-3000:]}")
        cpu = usage.ru_utime + usage.ru_stime
        self.phases.append({"phase": name, "wall": wall, "cpu": cpu, "peak_rss": usage.ru_maxrss * 1024})
        print(f"{name}: {wall:.1f} s", flush=True)

    def script(self, name: str, script: str, **options: Path | str) -> None:
        """Run one of the scripts of this folder."""
        flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
        self.run(name, [sys.executable, str(HERE / f"{script}.py"), *flags])


def harness_command(spec: dict[str, Any], model: Path, tasks: Path, output: Path) -> list[str]:
    """One `lm_eval` call for all metrics, with settings that hold for each of them."""
    metrics = spec["metrics"]
    # A window length belongs to the call, and it matters to the perplexity of text only.
    kinds = [m.get("sequence_length") for m in metrics.values() if m["kind"] == "perplexity"]
    windows = {length for length in kinds if length is not None} or {SEQUENCE_LENGTH}
    if len(windows) != 1:
        raise SystemExit(f"one lm_eval call has one max_length; the spec's perplexities have {sorted(windows)}")
    if any(metric.get("chat_template") or metric.get("few_shot") for metric in metrics.values()):
        raise SystemExit("one lm_eval call serves all tasks: no chat_template and no few_shot on single ones")
    model_settings = {
        "pretrained": model,
        "dtype": spec["model"].get("dtype", "bfloat16"),
        "max_length": windows.pop(),
        # Bits per byte and reward margins are sums of log-probabilities: not to be rounded to bfloat16.
        "softmax_dtype": "float32",
    }
    return [
        str(Path(sys.executable).with_name("lm_eval")),
        "run",
        "--model=hf",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in model_settings.items()),
        f"--include_path={tasks}",
        f"--tasks={','.join(task_names(tasks))}",
        "--device=cpu",
        f"--batch_size={max(metric.get('batch_size', 8) for metric in metrics.values())}",
        "--log_samples",
        f"--output_path={output}",
    ]


def task_names(tasks: Path) -> list[str]:
    return sorted(path.stem for path in tasks.glob("*.yaml"))


def main() -> None:
    paths = arguments("output")
    spec_path, output = paths.spec.resolve(), paths.output.resolve()
    spec = read_spec(spec_path)
    found = [(stage["kind"], stage["method"]["kind"]) for stage in spec["stages"]]
    if found != EXPECTED:
        raise SystemExit(f"these scripts are written for the stages {EXPECTED}; the spec has {found}")
    output.mkdir(parents=True)
    base = (spec_path.parent / spec["model"]["path"]).resolve()
    tasks, evaluations = output / "tasks", output / "evaluations"
    cpt, sft, sft_merged = output / "cpt", output / "sft", output / "sft-merged"
    dpo, dpo_merged, release = output / "dpo", output / "dpo-merged", output / "release"
    steps = Recorder(output)

    def evaluate(name: str, model: Path) -> None:
        steps.run(f"lm_eval {name}", harness_command(spec, model, tasks, evaluations / name))

    steps.script("tasks", "heldout_tasks", spec=spec_path, model=base, output=tasks)
    evaluate("base", base)
    steps.script("spectrum", "spectrum", spec=spec_path, model=base, output=output / "unfrozen.yaml")
    steps.script("cpt", "cpt", spec=spec_path, model=base, unfrozen=output / "unfrozen.yaml", output=cpt)
    evaluate("cpt", cpt)
    steps.script("sft", "sft", spec=spec_path, model=cpt, output=sft)
    steps.script("merge sft", "merge", spec=spec_path, stage="ift", model=cpt, adapter=sft, output=sft_merged)
    evaluate("ift", sft_merged)
    steps.script("dpo", "dpo", spec=spec_path, model=sft_merged, output=dpo)
    into = {"output": dpo_merged, "release": release}
    steps.script("merge dpo", "merge", spec=spec_path, stage="dpo", model=sft_merged, adapter=dpo, **into)
    evaluate("dpo", dpo_merged)
    steps.script("report", "report", spec=spec_path, evaluations=evaluations, output=output / "metrics.json")
    (output / "phases.json").write_text(json.dumps(steps.phases, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
