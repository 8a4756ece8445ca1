"""What every script here reads from the spec: the stage's numbers in TRL's terms, and its rows.

This stands in for the constants at the top of a script written by hand; it is read from the spec so that
both sides of the race are sure to have the same ones. Defaults are those that the spec's grammar documents.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

SCHEDULE, WARMUP, SEQUENCE_LENGTH, BATCH_SIZE, CHECKPOINT_EVERY = "cosine", 0.05, 1024, 16, 50


def read_spec(path: Path) -> dict[str, Any]:
    """The spec as it is written."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def stage_of(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """The only stage of a kind."""
    (stage,) = [stage for stage in spec["stages"] if stage["kind"] == kind]
    return stage


def arguments(*names: str) -> argparse.Namespace:
    """Paths on the command line: the spec, and those that are named."""
    parser = argparse.ArgumentParser()
    for name in ("spec", *names):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def training_rows(spec_path: Path, stage: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage's rows, each source as often as its weight says, in one seeded order."""
    rows: list[dict[str, Any]] = []
    for source in stage["data"]:
        weight = source.get("weight", 1)
        if weight != int(weight):
            raise SystemExit(f"{source['path']}: these scripts repeat rows a whole number of times, not {weight}")
        rows += read_jsonl(spec_path.parent / source["path"]) * int(weight)
    random.Random(seed_of(spec_path, stage)).shuffle(rows)  # noqa: S311 - order, not secrets
    return rows


def seed_of(spec_path: Path, stage: dict[str, Any]) -> int:
    """The stage's seed or the pipeline's."""
    return stage.get("seed", read_spec(spec_path).get("seed", 17))


def training_arguments(spec_path: Path, stage: dict[str, Any], output: Path) -> dict[str, Any]:
    """The arguments that `SFTConfig` and `DPOConfig` share."""
    train = stage["train"]
    micro = train.get("micro_batch_size", 1)
    return {
        "output_dir": str(output / "checkpoints"),
        # YAML 1.1 reads 3e-4 as text.
        "learning_rate": float(train["learning_rate"]),
        "max_steps": train["max_steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": train.get("batch_size", BATCH_SIZE) // micro,
        "lr_scheduler_type": train.get("schedule", SCHEDULE),
        "warmup_steps": train.get("warmup_ratio", WARMUP),
        "max_length": train.get("sequence_length", SEQUENCE_LENGTH),
        "bf16": True,
        "use_cpu": True,
        # TRL's default recomputes activations: a third more time, for memory that a CPU has.
        "activation_checkpointing": False,
        "seed": seed_of(spec_path, stage),
        "data_seed": seed_of(spec_path, stage),
        "save_steps": train.get("checkpoint_every", CHECKPOINT_EVERY),
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }


def messages(turns: str | list[dict[str, str]], role: str) -> list[dict[str, str]]:
    """A message list; plain text becomes one message of ``role``."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns
