"""Seven chains of different methods, one through the real flow: every hand-over from disk, and verified."""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

pytestmark = [pytest.mark.flow, pytest.mark.model]
DEADLINE = 240

CHAINS = {
    "full-lora-lora": ("kind: full", "kind: lora, rank: 4", "kind: lora, rank: 2, target_modules: attention"),
    "spectrum-pissa-milora": ("kind: spectrum, top_percent: 50", "kind: pissa, rank: 4", "kind: milora, rank: 4"),
    "lora-dora-svft": ("kind: lora, rank: 8", "kind: dora, rank: 4", "kind: svft, pattern: banded"),
    "qlora-qlora-qlora": ("kind: qlora, rank: 4", "kind: qlora, rank: 4, quantization: fp4", "kind: qlora, rank: 4"),
    "bitfit-lora_xs-vera": ("kind: bitfit", "kind: lora_xs, rank: 4", "kind: vera, rank: 8"),
    "svf-glora-full": ("kind: svf", "kind: glora, rank: 2", "kind: full"),
    "longlora-adalora-olora": (
        "kind: longlora, rank: 4, context_length: 1024",
        "kind: adalora, initial_rank: 4, target_rank: 2",
        "kind: olora, rank: 4",
    ),
}
IN_PREFECT = "full-lora-lora"
"""The others run in this process, stage after stage: what is tested is what they hand over, not what starts them."""
SPEC = """\
name: tiny
model: {{path: base, dtype: float32}}
seed: 3
metrics: {{pairs: {{kind: preference, data: {{path: data/pairs.heldout.jsonl}}, sequence_length: 128}}}}
stages:
  - {{name: knowledge, kind: cpt, method: {{{0}}}, data: [{{path: data/corpus.jsonl}}],
     train: {{learning_rate: 5e-3, max_steps: 6, sequence_length: 64, batch_size: 4, micro_batch_size: 2}}}}
  - {{name: answers, kind: ift, method: {{{1}}}, data: [{{path: data/instructions.jsonl}}],
     train: {{learning_rate: 1e-2, max_steps: 6, sequence_length: 128, batch_size: 4}}}}
  - {{name: manner, kind: dpo, method: {{{2}}}, data: [{{path: data/pairs.jsonl}}],
     train: {{learning_rate: 1e-3, max_steps: 4, sequence_length: 128, batch_size: 4, micro_batch_size: 4}}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_methods_hands_over_exactly(name: str, folder: Path, run_spec: Callable) -> None:
    spec = tiny.write_project(folder / name, SPEC.format(*CHAINS[name]))
    if name == IN_PREFECT:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        command = [sys.executable, "-m", "flows.cli", "run", str(spec), "--root", str(spec.parent / "runs")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE, env=environment)
        assert done.returncode == 0, done.stderr
    else:
        run_spec(spec)
    manifests = [json.loads(path.read_text()) for path in sorted(spec.parent.glob("runs/tiny/0*/manifest.json"))]
    assert len(manifests) == 5
    for number, (before, after) in enumerate(itertools.pairwise(manifests)):
        assert after["inputs"]["parent"] == before["identity"]
        if number == 3:
            break
        record = after["record"]
        assert f"kind: {record['method']}" in CHAINS[name][number]
        assert record["start"]["reload_error"] <= 1e-4
        assert not record["start"]["exact"] or record["start"]["adapted_difference"] <= 1e-4
        assert 0 <= record["hand_over"]["max_logit_error"] <= record["hand_over"]["tolerance"]
        assert record["training"]["trainable_parameters"] > 0
    assert manifests[3]["record"]["training"]["first_logged_loss"] == pytest.approx(math.log(2), abs=1e-3)
    (release,) = spec.parent.glob("runs/tiny/04-release-*/model/config.json")
    config = json.loads(release.read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config.get("attention_bias", False) == name.startswith("bitfit")
    assert config["max_position_embeddings"] == (1024 if name.startswith("longlora") else 512)
