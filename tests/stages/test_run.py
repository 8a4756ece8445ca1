"""A step from its job to its artifact: what is recorded, what is refused, what people get."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SPEC, write_data, write_model, write_project
from transformers import AutoModelForCausalLM, AutoTokenizer

from specs.base import fingerprint
from stages.artifact import MANIFEST, MODEL, read
from stages.conversation import end_of_text, turn_terminator
from stages.data_report import DATA_REPORT
from stages.errors import InvalidInput, StageFailed
from stages.identity import MEASURING_LIBRARIES, TRAINING_LIBRARIES
from stages.model import load_tokenizer
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import run_job

pytestmark = pytest.mark.model

STAGES = ("knowledge", "answers", "manner")
METRICS = SPEC.partition("metrics:")[2].partition("stages:")[0]
WITHOUT_METRICS = "\n".join(
    line for line in SPEC.replace(f"metrics:{METRICS}", "").splitlines() if "gates:" not in line
)


# What is recorded


def test_the_report_is_in_the_artifact_and_sealed_by_its_manifest(chain):
    for step in chain.steps[1:-1]:
        report = json.loads((step.artifact.path / DATA_REPORT).read_text())
        masks = step.artifact.manifest["record"]["masks"]
        assert DATA_REPORT in step.artifact.manifest["files"]
        assert report["stage"] == step.name
        assert report["total"]["rows_per_pass"] == masks["rows"]
        assert report["total"]["trained_tokens_per_pass"] == masks["trained_tokens"]
        assert [one["metric"] for one in report["overlap"]["sets"]] == ["domain", "answers", "qa", "pairs"]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_manifest_of_a_stage_says_what_happened(order, chain):
    step = chain.steps[order]
    record = step.artifact.manifest["record"]
    assert (record["stage"], record["kind"], record["method"]) == (step.name, step.stage.kind, step.stage.method.kind)
    assert set(record["versions"]) == set(TRAINING_LIBRARIES)
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"load", "train"} <= set(record["durations"])
    assert all(seconds > 0 for seconds in record["durations"].values())
    assert 50e6 < record["peak_memory"] < 50e9
    masks = record["masks"]
    assert 0 < masks["trained_tokens"] <= masks["tokens"]
    assert masks["terminator_trained"] is True
    assert (masks["trained_share"] == 1) == (step.stage.kind == "cpt")
    assert 0 <= record["hand_over"]["max_logit_error"] <= 1e-4
    assert record["start"]["reload_error"] <= 1e-5
    assert record["start"]["exact"] is (step.stage.method.kind != "qlora")
    assert (record["start"]["adapted_difference"] < 1e-5) is record["start"]["exact"]
    assert record["training"]["steps"] == step.stage.train.max_steps
    assert record["training"]["resumed_at"] == 0
    trained = json.loads((step.artifact.path / "training.json").read_text())
    losses = [entry["loss"] for entry in trained["training"]["curve"]]
    assert len(losses) == step.stage.train.max_steps
    assert losses[0] == record["training"]["first_logged_loss"]
    assert losses[-1] < losses[0]


def test_every_step_is_published_and_measured(chain):
    assert [step.name for step in chain.steps] == ["base", *STAGES, "release"]
    assert not chain.pending
    for step in chain.steps[:-1]:
        assert {one.metric for one in step.measurements} == {"domain", "answers", "qa", "pairs"}
        body = json.loads(Path(step.measurements[0].file).read_text())["body"]
        assert set(body["identity"]["versions"]) == set(MEASURING_LIBRARIES)
    assert not (chain.store / ".work").exists() or not list((chain.store / ".work").iterdir())


def test_each_stage_starts_from_what_the_one_before_published(chain):
    for before, after in zip(chain.steps, chain.steps[1:], strict=False):
        assert after.artifact.manifest["inputs"]["parent"] == before.artifact.identity
    weights = [load_file(step.artifact.model / "model.safetensors") for step in chain.steps]
    assert all(torch.equal(weights[4][name], weights[3][name]) for name in weights[3])
    embedding = "model.embed_tokens.weight"
    assert all(torch.equal(other[embedding], weights[0][embedding]) for other in weights)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not any(torch.equal(weights[n][name], weights[n + 1][name]) for n in (1, 2))


def test_gates_can_be_judged(chain):
    domain = [step.evaluation("domain").measure(None).value for step in chain.steps[:2]]
    answers = [step.evaluation("answers").measure(None).value for step in chain.steps[1:3]]
    assert domain[1] < domain[0]
    assert answers[1] < answers[0]
    assert chain.steps[3].evaluation("pairs").measure("reward_accuracy").value > 0.6


# What people get


def test_the_release_is_a_plain_checkpoint(chain):
    folder = chain.steps[-1].artifact.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    original = load_tokenizer(chain.steps[0].artifact.model)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert (tokenizer.eos_token, tokenizer.pad_token) == (original.eos_token, original.pad_token)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "say the"}], return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]


def stops(folder: Path) -> set[int]:
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return {found} if isinstance(found, int) else set(found)


def test_generation_stops_at_what_was_trained_to_end_a_turn_and_a_text(chain):
    folder = chain.steps[-1].artifact.model
    tokenizer = load_tokenizer(folder)
    ends = {turn_terminator(tokenizer), end_of_text(tokenizer, None)}
    assert len(ends) == 2
    assert stops(folder) == ends


def test_a_base_whose_eos_is_the_end_of_text_learns_to_stop_at_the_end_of_a_turn(tmp_path, run_spec):
    spec = write_project(tmp_path / "project", only("answers"))
    base = tmp_path / "project/base"
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        document = json.loads((base / name).read_text())
        document |= {"eos_token": "<|endoftext|>"} if "tokenizer" in name else {"eos_token_id": 0}
        (base / name).write_text(json.dumps(document))
    assert stops(base) == {0}
    plan = run_spec(spec)
    for step in plan.steps[1:]:
        assert stops(step.artifact.model) == {0, 2}
        assert load_tokenizer(step.artifact.model).eos_token == "<|endoftext|>"


def test_the_release_has_the_dtype_of_the_spec(tmp_path, run_spec):
    plan = run_spec(write_project(tmp_path / "project", only("answers").replace("float32", "bfloat16")))
    dtypes = [
        {t.dtype for t in load_file(step.artifact.path / MODEL / "model.safetensors").values()}
        for step in plan.steps[1:]
    ]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


# What is refused


def only(stage: str, **edits: str) -> str:
    """The tiny spec without metrics and with one stage of two steps."""
    head, *stages = WITHOUT_METRICS.split("  - name: ")
    text = head + next(f"  - name: {one}" for one in stages if one.startswith(stage))
    for steps in ("max_steps: 12", "max_steps: 10"):
        text = text.replace(steps, "max_steps: 2")
    for old, new in edits.values():
        assert old in text
        text = text.replace(old, new)
    return text.rstrip() + "\n"


@pytest.fixture
def before_answers(tmp_path, run_spec):
    """A project of two stages, the first one published: the job of the second."""
    head, knowledge, answers, _ = WITHOUT_METRICS.split("  - name: ")
    text = f"{head}  - name: {knowledge}  - name: {answers}".replace("max_steps: 12", "max_steps: 2")
    plan = run_spec(write_project(tmp_path / "project", text), until="knowledge")
    return plan.job(plan.steps[2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "probe.safetensors"])
def test_a_damaged_parent_refuses_the_child_and_names_the_file(name, before_answers):
    file = Path(before_answers.start) / name
    flip_a_bit(file)
    with pytest.raises(StageFailed, match=f"{name} was changed"):
        run_job(before_answers)
    assert not Path(before_answers.target).exists()


def test_a_start_that_loads_as_another_model_is_refused_whatever_its_manifest_says(before_answers):
    start = Path(before_answers.start)
    file = start / MODEL / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    manifest = json.loads((start / MANIFEST).read_text())
    content = file.read_bytes()
    manifest["files"]["model/model.safetensors"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    del manifest["seal"]
    (start / MANIFEST).write_text(json.dumps(manifest | {"seal": fingerprint(manifest)}))
    assert read(start) is not None
    with pytest.raises(StageFailed, match="loads as another model than was published"):
        run_job(before_answers)
    assert not Path(before_answers.target).exists()


def test_a_parent_that_is_not_there_is_refused(before_answers):
    shutil.rmtree(before_answers.start)
    with pytest.raises(StageFailed, match="was not published"):
        run_job(before_answers)


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_data_that_changes_while_the_stage_runs_is_refused(change, before_answers, monkeypatch):
    from stages import make

    fit = make.fit
    file = Path(before_answers.folder) / "data/instructions.jsonl"

    def meanwhile(*arguments, **settings):
        found = fit(*arguments, **settings)
        if change == "deleted":
            file.unlink()
        else:
            file.write_text(file.read_text().replace("say", "sing", 1))
        return found

    monkeypatch.setattr(make, "fit", meanwhile)
    with pytest.raises(StageFailed, match=r"instructions\.jsonl.*Nothing is published"):
        run_job(before_answers)
    assert not Path(before_answers.target).exists()


def test_data_that_changed_between_the_plan_and_the_run_is_refused(before_answers):
    file = Path(before_answers.folder) / "data/instructions.jsonl"
    file.write_text(file.read_text().replace("say", "sing", 1))
    with pytest.raises(StageFailed, match=r"instructions\.jsonl\. Nothing is published"):
        run_job(before_answers)
    assert not Path(before_answers.target).exists()


def run_base(folder: Path, text: str = WITHOUT_METRICS) -> None:
    spec = folder / "spec.yaml"
    spec.write_text(text)
    plan = make_plan(load_pipeline(spec)[0], folder, folder / "runs")
    run_job(plan.job(plan.steps[0]))


@pytest.fixture
def project(tmp_path) -> Path:
    write_model(tmp_path / "base")
    write_data(tmp_path)
    return tmp_path


def without_weights(base: Path) -> None:
    (base / "model.safetensors").unlink()


def without_config(base: Path) -> None:
    (base / "config.json").unlink()


def of_unknown_kind(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "no_such_model"}')


def with_broken_config(base: Path) -> None:
    (base / "config.json").write_text("{")


def with_torn_weights(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_tokenizer(base: Path) -> None:
    for file in base.glob("tokenizer*"):
        file.unlink()


def with_other_shapes(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def with_missing_weights(base: Path) -> None:
    """The library only warns, and draws the missing ones at random."""
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def with_nan(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def that_is_an_encoder(base: Path) -> None:
    from transformers import T5EncoderModel
    from transformers.models.t5 import T5Config

    T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=320)).save_pretrained(
        base
    )


def quantised(base: Path) -> None:
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map={"": "cpu"}).save_pretrained(
        base
    )


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (without_weights, "not a model"),
        (without_config, "not a model"),
        (of_unknown_kind, "cannot be loaded"),
        (with_broken_config, r"config\.json: .*JSON"),
        (with_torn_weights, "cut off"),
        (with_other_shapes, "cannot be loaded"),
        (without_tokenizer, "tokenizer"),
        (with_missing_weights, "up_proj"),
        (with_nan, "nan"),
        (that_is_an_encoder, "cannot be loaded"),
        (quantised, "quantised already"),
    ],
)
def test_a_base_that_is_no_whole_model_is_refused(harm, complaint, project):
    harm(project / "base")
    with pytest.raises(InvalidInput, match=complaint):
        run_base(project)
    assert not list((project / "runs").glob("*/00-base-*"))


@pytest.mark.parametrize("stage", ["answers", "manner"])
def test_a_tokenizer_without_chat_template_is_refused_where_one_is_needed(stage, project, run_spec):
    (project / "base/chat_template.jinja").unlink()
    spec = project / "spec.yaml"
    spec.write_text(only(stage))
    with pytest.raises(InvalidInput, match=r"no chat template.*model\.chat_template"):
        run_spec(spec)


def test_a_chat_template_can_be_laid_over_the_base(project, run_spec):
    (project / "base/chat_template.jinja").rename(project / "chat.jinja")
    spec = project / "spec.yaml"
    spec.write_text(only("answers", model=("{path: base,", "{path: base, chat_template: chat.jinja,")))
    plan = run_spec(spec, until="answers")
    for step in plan.steps[:2]:
        assert (step.artifact.model / "chat_template.jinja").read_text() == (project / "chat.jinja").read_text()
    assert not (project / "base/chat_template.jinja").exists()


def test_a_library_that_cannot_be_imported_is_named_before_there_is_a_log(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')")
    command = [sys.executable, "-m", "stages.run", "--wait", str(os.getpid()), "stage"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, input="", capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode == StageFailed.exit_code
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["event"] == "failed"
    assert told["reason"] == "ImportError: libcudart.so.99: cannot open shared object file"


def test_a_published_release_is_what_was_released_and_its_card_says_what_the_stages_recorded(chain, tmp_path):
    from flows.engine import Run
    from flows.publish.folder import to_folder
    from flows.publish.publication import gather

    spec = chain.folder / "spec.yaml"
    publication, against = gather(Run(spec, chain.store.parent), with_warnings=False)
    assert against == []
    assert to_folder(publication, tmp_path / "out")
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(7))
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    kept = AutoModelForCausalLM.from_pretrained(chain.steps[-1].artifact.model, dtype="auto")
    assert torch.equal(given(ids).logits, kept(ids).logits)
    text = (tmp_path / "out/README.md").read_text()
    assert spec.read_text() in text
    for step in chain.steps[1:-1]:
        record = step.artifact.manifest["record"]
        assert f"{record['training']['steps']} steps over {record['training']['sequences']} sequences" in text
        assert f"{record['masks']['tokens']} tokens, {record['masks']['trained_tokens']} of them trained on" in text
    assert f"| {chain.steps[3].evaluation('domain').measure(None).value:.4g} (" in text
    assert str(chain.folder) not in text
    assert text.count("Duplicates: ") == 3
    assert "Overlap with the evaluation rows of domain: " in text
