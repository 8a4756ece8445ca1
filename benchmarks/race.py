"""Race `trivium run` (A) against the same chain by hand (B): same spec, same rows, same steps, same box.

    python benchmarks/race.py tiny|quickstart [--repeats N] [--base FOLDER]

Each pair runs both sides once, in fresh folders with fresh Hugging Face caches; who goes first alternates.
`by_hand/README.md` says what is the same on both sides and what is not. What is compared is wall time.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
GOAL = 0.8
LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "lm-eval",
    "prefect",
)
LM_EVAL_CALLS = 4
_PHASE = re.compile(r"^✓ (\S+): (\S+) ([\d.]+) s", re.MULTILINE)
_TICK = 0.5

Side = dict[str, Any]


def prepare(what: str, folder: Path, base: Path | None) -> Path:
    """Build the project once, outside the race, and return its spec.

    The base is a plain checkpoint for both sides, so a GGUF is converted here. Gates warn instead of stopping:
    a race must not end early, and the scripts by hand have none.
    """
    if what == "tiny":
        sys.path.insert(0, str(HERE.parent / "tests"))
        from tiny import write_project

        spec = write_project(folder)
    else:
        from flows.templates import write

        write(what, folder)
        spec = folder / "spec.yaml"
    yaml = YAML()
    document = yaml.load(spec)
    model = document["model"]
    if base is not None:
        model["path"] = str(base.resolve())
    elif "gguf" in model:
        from stages.model import convert_gguf

        convert_gguf(folder / model["gguf"], folder / "plain-base")
        model["path"] = "plain-base"
    model.pop("gguf", None)
    for stage in document["stages"]:
        stage["on_gate_failure"] = "warn"
    with spec.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)
    return spec


class Tree(threading.Thread):
    """Samples the memory and the CPU time of a process and everything below it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._over = threading.Event()
        self._cpu: dict[int, float] = {}
        self.peak = 0

    def run(self) -> None:
        """Sample until `end`, or until the process is gone."""
        while not self._over.wait(_TICK):
            try:
                members = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(self._rss(member) for member in members))

    def _rss(self, member: psutil.Process) -> int:
        try:
            with member.oneshot():
                times = member.cpu_times()
                self._cpu[member.pid] = times.user + times.system
                return int(member.memory_info().rss)
        except psutil.Error:
            return 0

    def end(self) -> float:
        """Stop sampling; the CPU seconds seen, of every process up to the last sample before it ended."""
        self._over.set()
        self.join()
        return sum(self._cpu.values())


def measured(command: list[str], place: Path) -> Side:
    """Run a command in a fresh folder; wall and CPU seconds, memory, and what it printed."""
    place.mkdir(parents=True)
    home = place / "huggingface"
    own = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The pipe is no terminal: lines must not be wrapped at 80 columns.
        "COLUMNS": "200",
    }
    log = place / "output.log"
    load = os.getloadavg()[0]
    started = time.monotonic()
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | own, cwd=place)
        tree = Tree(child.pid)
        tree.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    sampled = tree.end()
    text = log.read_text(encoding="utf-8", errors="replace")
    if child.returncode:
        raise SystemExit(f"{command}: exit code {child.returncode}\n{text[-4000:]}")
    return {
        "wall": wall,
        # The kernel counts only processes that somebody waited for; a server that was left to itself is not.
        "cpu": max(usage.ru_utime + usage.ru_stime, sampled),
        "cpu_sampled": sampled,
        "peak_rss_of_one_process": usage.ru_maxrss * 1024,
        "peak_rss_of_all": tree.peak,  # pages that processes share are counted in each
        "load_before": load,
        "output": text,
    }


def run_flow(spec: Path, place: Path) -> Side:
    """`trivium run`, with Prefect and its embedded server; the spec is read where it is, artifacts go to the place."""
    root = place / "artifacts"
    command = [str(Path(sys.executable).with_name("trivium")), "run", str(spec), "--root", str(root)]
    side = measured(command, place)
    found = [
        {"phase": f"{step} {phase}", "wall": float(seconds)}
        for step, phase, seconds in _PHASE.findall(side.pop("output"))
    ]
    rest = side["wall"] - sum(phase["wall"] for phase in found)
    side["phases"] = [*found, {"phase": "Prefect, start-up, imports not hidden, gates, tables", "wall": rest}]
    side["metrics"] = flow_metrics(root)
    return side


def flow_metrics(root: Path) -> list[dict[str, float]]:
    """Per step in order, the base first: metric -> value, from the evaluation files."""
    steps = []
    for step in sorted(root.glob("*/[0-9][0-9]-*")):
        values: dict[str, float] = {}
        for file in sorted(step.glob("evaluation/*.json")):
            body = json.loads(file.read_text(encoding="utf-8"))["body"]
            name = file.stem.rpartition("-")[0]
            measures = {measure: found["value"] for measure, found in body["measures"].items()}
            if body["log_likelihoods"]:
                values |= {f"{name}.{measure}": value for measure, value in measures.items()}
            else:
                values[name] = measures[body["default"]]
        if values:
            steps.append(values)
    return steps


def run_by_hand(spec: Path, place: Path) -> Side:
    """The scripts of `by_hand/`, one process each, in order."""
    results = place / "by-hand"
    driver = str(HERE / "by_hand" / "run.py")
    side = measured([sys.executable, driver, "--spec", str(spec), "--output", str(results)], place)
    side.pop("output")
    side["phases"] = json.loads((results / "phases.json").read_text(encoding="utf-8"))
    side["metrics"] = list(json.loads((results / "metrics.json").read_text(encoding="utf-8")).values())
    return side


def warm_page_cache() -> None:
    """Read the libraries from the disk once, so that the first side does not pay for that alone."""
    program = "import trl, peft, bitsandbytes, lm_eval.models.huggingface, prefect, matplotlib.pyplot"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    index_cost()


def index_cost() -> dict[str, float]:
    """What one `lm_eval` call spends on indexing the tasks it ships, none of which this race uses."""
    program = (
        "import json, time\n"
        "from lm_eval.tasks import TaskManager\n"
        "wall, cpu = time.monotonic(), time.process_time()\n"
        "TaskManager()\n"
        "print(json.dumps({'wall': time.monotonic() - wall, 'cpu': time.process_time() - cpu}))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(pair: dict[str, Any]) -> dict[str, float]:
    """Flow over by hand: the race's number, and two that say where it comes from."""
    flow, hand, index = pair["flow"], pair["by_hand"], pair["lm_eval_index"]
    return {
        "wall": flow["wall"] / hand["wall"],
        "cpu": flow["cpu"] / hand["cpu"],
        "wall_if_lm_eval_indexed_nothing": flow["wall"] / (hand["wall"] - LM_EVAL_CALLS * index["wall"]),
        "cpu_if_lm_eval_indexed_nothing": flow["cpu"] / (hand["cpu"] - LM_EVAL_CALLS * index["cpu"]),
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, check=False, capture_output=True, text=True)
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def show_side(title: str, side: Side) -> None:
    gigabytes = [side[key] / 1e9 for key in ("peak_rss_of_one_process", "peak_rss_of_all")]
    print(
        f"\n{title}: {side['wall']:.1f} s wall, {side['cpu']:.1f} s CPU, peak {gigabytes[0]:.2f} GB in one process, "
        f"{gigabytes[1]:.2f} GB in all (load before: {side['load_before']:.1f})"
    )
    for phase in side["phases"]:
        extra = ""
        if "cpu" in phase:
            extra = f" {phase['cpu']:8.1f} s CPU {phase['peak_rss'] / 1e9:6.2f} GB"
        print(f"  {phase['phase']:<52}{phase['wall']:8.1f} s{extra}")


def show_metrics(flow: list[dict[str, float]], hand: list[dict[str, float]]) -> None:
    print(f"\n{'metric, flow | by hand':<28}" + "".join(f"{name:>20}" for name in ("base", "CPT", "IFT", "DPO")))
    for name in hand[-1]:
        cells = ""
        for ours, theirs in zip(flow, hand, strict=True):
            pair = " | ".join("-" if name not in side else f"{side[name]:.4f}" for side in (ours, theirs))
            cells += f"{pair:>20}"
        print(f"{name:<28}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tiny", "quickstart"))
    parser.add_argument("--repeats", type=int, default=1, help="pairs of runs")
    parser.add_argument("--base", type=Path, help="a plain checkpoint to use instead of the project's own base")
    asked = parser.parse_args()
    pairs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        folder = Path(name)
        spec = prepare(asked.what, folder / "project", asked.base)
        warm_page_cache()
        for number in range(asked.repeats):
            runs = {"flow": run_flow, "by_hand": run_by_hand}
            pair: dict[str, Any] = {}
            for side in sorted(runs, reverse=number % 2 == 0):
                pair[side] = runs[side](spec, folder / f"{number}-{side}")
            pair["lm_eval_index"] = index_cost()
            pair["ratios"] = ratios(pair)
            pairs.append(pair)
            show_side(f"pair {number + 1}, A: trivium run", pair["flow"])
            show_side(f"pair {number + 1}, B: by hand", pair["by_hand"])
            show_metrics(pair["flow"]["metrics"], pair["by_hand"]["metrics"])
            print("\nA / B: " + ", ".join(f"{key} {value:.2f}" for key, value in pair["ratios"].items()), flush=True)
    median = {key: statistics.median(pair["ratios"][key] for pair in pairs) for key in pairs[0]["ratios"]}
    record = {"what": asked.what, **environment(), "goal": GOAL, "median": median, "pairs": pairs}
    results = HERE / "results" / f"race-{asked.what}.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nmedian of {len(pairs)}: " + ", ".join(f"{key} {value:.2f}" for key, value in median.items()))
    print(f"goal, wall at most {GOAL}: {'met' if median['wall'] <= GOAL else 'not met'}; kept in {results.name}")


if __name__ == "__main__":
    main()
