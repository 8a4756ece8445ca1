"""Advice: each piece with its text, its line and its source; and silence where a spec gives no cause."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from headers import llama, write_headers
from tiny import SPEC, write_data, write_rows

import specs
from stages import advice
from stages.advice import ADVICE, warnings
from stages.pipeline import load_pipeline

SPECTRUM = "{kind: spectrum, top_percent: 50}"
LORA = "{kind: lora, rank: 4}"
QLORA = "{kind: qlora, rank: 4}"
IFT_STEPS = "learning_rate: 1e-2, max_steps: 12, sequence_length: 128, batch_size: 2}"
DPO_RATE = "learning_rate: 1e-2, max_steps: 10"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_headers(tmp_path / "base", llama())
    write_data(tmp_path)
    return tmp_path


def advised(folder: Path, *changes: tuple[str, str], base: Path | None = None) -> list[str]:
    """What the edited spec is advised against, without the path."""
    text = SPEC
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    spec = folder / "spec.yaml"
    spec.write_text(text)
    return [str(found).removeprefix(f"{spec}:") for found in warnings(*load_pipeline(spec), base)]


CASES: dict[str, tuple[list[tuple[str, str]], str]] = {
    "LoRA in CPT": (
        [(SPECTRUM, "{kind: lora, rank: 8}")],
        "12:26: stages[0].method.rank: warning: method lora at rank 8 learns less in continued pre-training than whole "
        "weights do; use method spectrum or full (Biderman et al., arXiv 2405.09673)",
    ),
    "QLoRA in CPT, its rank by default": (
        [(SPECTRUM, "{kind: qlora, target_modules: [q_proj]}")],
        "12:5: stages[0].method.rank: warning: method qlora at rank 16 learns less in continued pre-training",
    ),
    "a large alpha": (
        [(LORA, "{kind: lora, rank: 4, alpha: 32}")],
        "18:35: stages[1].method.alpha: warning: alpha 32 is 8 times the rank of 4; twice the rank, 8, is the default "
        "and what that paper advises: remove alpha, or use method rslora if the rank is to vary (Biderman et al., "
        "arXiv 2405.09673)",
    ),
    "a small alpha": (
        [(LORA, "{kind: dora, rank: 8, alpha: 4}")],
        "18:35: stages[1].method.alpha: warning: alpha 4 is 0.5 times the rank of 8; twice the rank, 16, is",
    ),
    "rows that cannot be used": (
        [
            (
                "data: [{path: data/corpus.jsonl}]",
                'data: [{path: "data/*.jsonl", on_bad_row: drop, max_bad_rows: 100%}]',
            ),
        ],
        "13:5: stages[0].data: warning: 160 of 205 rows of data/*.jsonl will be left out; the first is "
        "data/instructions.heldout.jsonl:1: no column 'text'; columns: messages (on_bad_row: drop)",
    ),
    "epochs over a small set": (
        [("max_steps: 12, sequence_length: 128, batch_size: 2}", "epochs: 3, sequence_length: 128, batch_size: 2}")],
        "20:34: stages[1].train.epochs: warning: 3 passes over 60 rows: on a small set, answers are learned by heart "
        "after the first pass or two; use epochs: 2 or less, or more rows, and gate on a metric over held-out rows "
        "(Ouyang et al., arXiv 2203.02155, section 3.5)",
    ),
    "steps over a small set": (
        [(IFT_STEPS, IFT_STEPS.replace("12", "90"))],
        "20:5: stages[1].train.epochs: warning: 3 passes over 60 rows: ",
    ),
    "a rank beyond use": (
        [(LORA, "{kind: lora, rank: 14}")],
        "18:26: stages[1].method.rank: warning: above rank 10, the update of model.layers.0.self_attn.k_proj (16 x 32) "
        "has more parameters than the matrix itself; use a smaller rank, name larger target_modules, or train whole "
        "matrices with spectrum or full (Hu et al., arXiv 2106.09685, section 4)",
    ),
    "a release in bfloat16": (
        [(DPO_RATE, DPO_RATE.replace("1e-2", "5e-5")), ("dtype: float32", "dtype: bfloat16")],
        "26:13: stages[2].train.learning_rate: warning: at a learning rate of 5e-05, the release's cast to bfloat16 "
        "rounds away a large part of what was learned (bfloat16: 40% of LoRA's update at 5e-5, 91% at 5e-6); write "
        "model.dtype: float32, or let gates judge it (measured: docs/decisions/0004)",
    ),
    "a release in float16": (
        [(DPO_RATE, DPO_RATE.replace("1e-2", "5e-6")), ("dtype: float32", "dtype: float16")],
        "26:13: stages[2].train.learning_rate: warning: at a learning rate of 5e-06, the release's cast to float16",
    ),
    "weights in bfloat16 after a small step": (
        [
            ("learning_rate: 5e-3", "learning_rate: 2e-5"),
            (IFT_STEPS, IFT_STEPS.replace("}", ", weights_dtype: bfloat16}")),
        ],
        "20:86: stages[1].train.weights_dtype: warning: weights_dtype bfloat16 rounds away a large part of what stage "
        "knowledge learned at a learning rate of 2e-05, and the merge keeps the rounded weights; remove weights_dtype "
        "(measured: docs/decisions/0004)",
    ),
    "quantised twice": (
        [(LORA, QLORA)],
        "24:14: stages[2].method.kind: warning: method qlora quantises a start whose base stage answers had quantised "
        "already: what was learned there is mostly rounded away again; use qa_lora in both, whose merge survives, or a "
        "method on unquantised weights in one of the two (measured: docs/decisions/0007)",
    ),
    "a group as long as a sequence": (
        [(LORA, "{kind: longlora, rank: 2, group_size: 128}")],
        "18:39: stages[1].method.group_size: warning: a group of 128 tokens holds a whole sequence of 128",
    ),
    "a context that no sequence fills": (
        [(LORA, "{kind: longlora, rank: 2, context_length: 1024}")],
        "18:39: stages[1].method.context_length: warning: context_length 1024 stretches the rope, and no sequence is "
        "longer than 128: what it is stretched for is never trained; raise train.sequence_length to it (Chen et al., "
        "arXiv 2309.12307)",
    ),
    "VeRA at LoRA's rate": (
        [(LORA, "{kind: vera}"), (IFT_STEPS, IFT_STEPS.replace("1e-2", "2e-4"))],
        "20:13: stages[1].train.learning_rate: warning: method vera hardly moves at a learning rate of 0.0002; use one "
        "10 to 100 times as large as for lora (Kopiczko et al., arXiv 2310.11454)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_piece_of_advice(project, case):
    changes, wanted = CASES[case]
    [found] = advised(project, *changes)
    assert found.startswith(wanted)


def test_adapters_on_a_mixture_leave_its_experts(project):
    write_headers(project / "base", llama(experts=3), model_type="mixtral")
    ift, dpo = advised(project)
    assert ift == (
        "18:5: stages[1].method.target_modules: warning: the experts, 85% of the weights inside the layers, stay "
        "frozen: method lora adapts linear modules; methods full and spectrum train them (transformers 5: the experts "
        "of a layer are one parameter, no linear modules)"
    )
    assert dpo.startswith("24:5: stages[2].method.target_modules: warning: the experts")


def test_every_piece_is_shown_above_and_has_a_source():
    shown = [wanted for _, wanted in CASES.values()]
    for one in ADVICE:
        assert one.check.__doc__
        assert one.source in " ".join(shown) or one.check is advice.experts_stay_frozen


SILENT: dict[str, list[tuple[str, str]]] = {
    "the tiny spec": [],
    "LoRA at a rank of 256 in CPT": [("path: base,", "gguf: base.gguf,"), (SPECTRUM, "{kind: lora, rank: 256}")],
    "alpha at twice the rank": [(LORA, "{kind: lora, rank: 4, alpha: 8}")],
    "alpha at the rank": [(LORA, "{kind: loftq, rank: 4, alpha: 4}")],
    "rsLoRA's alpha": [(LORA, "{kind: rslora, rank: 4, alpha: 32}")],
    "two epochs": [("max_steps: 12, sequence_length: 128, batch_size: 2}", "epochs: 2, batch_size: 2}")],
    "many epochs of CPT": [("max_steps: 12, sequence_length: 64", "epochs: 9, sequence_length: 64")],
    "a release in float32": [(DPO_RATE, DPO_RATE.replace("1e-2", "5e-6"))],
    "a release in float16 at a rate that it can hold": [
        (DPO_RATE, DPO_RATE.replace("1e-2", "5e-5")),
        ("dtype: float32", "dtype: float16"),
    ],
    "an earlier stage's small rate": [
        (IFT_STEPS, IFT_STEPS.replace("1e-2", "5e-6")),
        ("dtype: float32", "dtype: bfloat16"),
    ],
    "quantised after LoRA": [(IFT_STEPS, IFT_STEPS.replace("1e-2", "1e-5"))],
    "quantised on another grid": [
        (LORA, "{kind: qlora, rank: 4, quantization: fp4}"),
        (IFT_STEPS, IFT_STEPS.replace("1e-2", "1e-5")),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_a_spec_that_gives_no_cause_gets_no_advice(project, case):
    assert advised(project, *SILENT[case]) == []


def test_a_higher_rank_is_advised_only_where_it_is_of_use(project):
    lora = (SPECTRUM, "{kind: lora, rank: 8}")
    [unknown] = advised(project, ("path: base,", "gguf: base.gguf,"), lora)
    assert "use method spectrum or full, or a rank of 256 and more (" in unknown
    write_headers(project / "wide", {"model.layers.0.self_attn.q_proj.weight": (512, 512)})
    [wide] = advised(project, ("path: base,", "gguf: base.gguf,"), lora, base=project / "wide")
    assert wide == unknown
    [narrow] = advised(project, lora)
    assert "256" not in narrow


def test_a_large_set_may_be_passed_often(project):
    question = {"prompt": "a", "completion": "b"}
    write_rows(project / "data/instructions.jsonl", [question] * 5_000)
    epochs = ("max_steps: 12, sequence_length: 128, batch_size: 2}", "epochs: 3, batch_size: 2}")
    assert advised(project, epochs) == []
    write_rows(project / "data/instructions.jsonl", [question] * 2_500)
    assert len(advised(project, epochs)) == 1
    twice = ("[{path: data/instructions.jsonl}]", "[{path: data/instructions.jsonl, weight: 2}]")
    assert advised(project, epochs, twice) == []


def test_no_more_rows_are_read_than_decide_it(project, monkeypatch):
    read = []
    monkeypatch.setattr(advice, "read_source", lambda *_: (read.append(number) for number in range(10**9)))
    epochs = ("max_steps: 12, sequence_length: 128, batch_size: 2}", "epochs: 3, batch_size: 2}")
    assert advised(project, epochs) == []
    assert len(read) == advice.SMALL_SET
    read.clear()
    assert advised(project) == []
    assert len(read) <= advice.SMALL_SET


def test_a_base_that_cannot_be_read_is_no_reason_for_advice_to_fail(project):
    (project / "base/model.safetensors").write_bytes(b"no header")
    assert len(advised(project, (SPECTRUM, "{kind: lora, rank: 8}"))) == 1


def test_the_quickstart_gives_no_cause(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text((Path(specs.__file__).parent / "quickstart.yaml").read_text())
    assert warnings(*load_pipeline(spec)) == []


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_the_commands_print_it_and_end_with_0(project, command):
    changes, wanted = CASES["LoRA in CPT"]
    advised(project, *changes)
    (project / "base/config.json").write_text(json.dumps({"model_type": "no such one"}))
    script = "import sys, flows.cli; sys.exit(flows.cli._run(sys.argv[1:]) or ('torch' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, command, project / "spec.yaml"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0
    first, *others = done.stderr.splitlines()
    assert first == f"{project / 'spec.yaml'}:{wanted}"
    assert ["no gate uses this metric" in line for line in others] == [True] * (command == "validate")
