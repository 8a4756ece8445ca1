"""Unmergeable methods through the flow: allowed last, published as base + adapter, loaded by one call."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import SPEC, write_data, write_model
from transformers import AutoModelForCausalLM

from specs.load import SpecError
from stages import probe, serving
from stages.artifact import ADAPTER, MODEL, damage, read
from stages.check import check_spec
from stages.errors import InvalidInput, StageFailed
from stages.model import load_plain
from stages.pipeline import load_pipeline

pytestmark = pytest.mark.model


def ids_of(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 300, (rows, 12), generator=torch.Generator().manual_seed(7))


# Through the flow: cpt with LoRA, then each method as the last stage, as ift or as dpo

CHAINS = {
    "prefix_tuning": ("ift", "{kind: prefix_tuning, virtual_tokens: 4}"),
    "prompt_tuning": ("dpo", "{kind: prompt_tuning, virtual_tokens: 4}"),
    "bottleneck": ("ift", "{kind: bottleneck, size: 4}"),
    "llama_adapter": ("dpo", "{kind: llama_adapter, length: 4}"),
}
every_chain = pytest.mark.parametrize("method", CHAINS)
HEAD, KNOWLEDGE, ANSWERS, MANNER = (
    "".join(f"{line}\n" for line in part.splitlines() if "gates" not in line)
    for part in SPEC.replace("max_steps: 12", "max_steps: 3")
    .replace("max_steps: 10", "max_steps: 3")
    .split("  - name: ")
)
KNOWLEDGE = KNOWLEDGE.replace("{kind: spectrum, top_percent: 50}", "{kind: lora, rank: 4}")


def spec_text(method: str, kind: str = "ift", head: str = HEAD, before: str = f"  - name: {KNOWLEDGE}") -> str:
    last = MANNER if kind == "dpo" else ANSWERS.replace("batch_size: 2}", "batch_size: 2, packing: false}")
    for old in ("{kind: lora, rank: 4}", "{kind: qlora, rank: 4}"):
        last = last.replace(old, method)
    return f"{head}{before}  - name: {last}"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def chains(project, run_spec):
    """The plan after a method's chain ran; base and first stage are one for all."""
    found = {}

    def run(name: str):
        if name not in found:
            kind, method = CHAINS[name]
            file = project / f"{name}.yaml"
            file.write_text(spec_text(method, kind))
            found[name] = run_spec(file)
        return found[name]

    return run


@every_chain
def test_the_artifact_is_an_adapter_and_the_hashes_of_its_base(method, chains, project):
    plan = chains(method)
    assert not plan.pending
    knowledge, stage = plan.steps[1].artifact, plan.steps[2].artifact
    assert not (stage.path / MODEL).exists()
    assert {path.name for path in stage.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert stage.model == knowledge.model
    assert stage.loadable == stage.path
    record = stage.manifest["record"]
    assert record["beneath"]["identity"] == knowledge.identity
    weights = record["beneath"]["files"]["model.safetensors"]
    assert weights == knowledge.manifest["files"]["model/model.safetensors"]["sha256"]
    assert record["hand_over"]["max_logit_error"] == 0
    assert record["hand_over"]["unmerged"]
    assert (record["start"]["adapted_difference"] < 1e-6) is (method in {"bottleneck", "llama_adapter"})
    settings = json.loads((stage.adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None
    assert str(project) not in (stage.adapter / "adapter_config.json").read_text()
    assert json.loads((knowledge.path / ADAPTER / "adapter_config.json").read_text())["base_model_name_or_path"] is None


@every_chain
def test_one_call_loads_stage_and_release_as_they_were_trained(method, chains, tmp_path):
    plan = chains(method)
    stage, release = plan.steps[2].artifact, plan.steps[3].artifact
    elsewhere = shutil.copytree(release.path, tmp_path / "taken along")
    ids = ids_of()
    found = []
    for folder in (stage.path, release.path, elsewhere):
        model, tokenizer = serving.load(folder)
        found.append(probe.logits(model, ids))
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": "say the"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**encoded, max_new_tokens=4, do_sample=False)
        assert answer.shape[1] > encoded["input_ids"].shape[1]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], probe.logits(load_plain(stage.model, torch.float32), ids))


def published(plan, folder: Path) -> Path:
    from flows.publish.folder import to_folder
    from flows.publish.publication import Publication, gathered_files

    release = plan.steps[-1].artifact
    to_folder(Publication(plan, release, *gathered_files(release), {}), folder)
    return folder


@every_chain
def test_what_is_published_is_loaded_by_the_same_call(method, chains, tmp_path):
    plan = chains(method)
    out = published(plan, tmp_path / "out")
    assert torch.equal(
        probe.logits(serving.load(out)[0], ids_of()),
        probe.logits(serving.load(plan.steps[-1].artifact.path)[0], ids_of()),
    )
    with pytest.raises((OSError, ValueError, TypeError)):  # a plain loader must not get the base alone
        AutoModelForCausalLM.from_pretrained(out)


def test_peft_alone_reads_a_release_of_its_own_methods(chains):
    from peft import PeftModel

    release = chains("prefix_tuning").steps[3].artifact.path
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(release / MODEL), release / ADAPTER)
    assert torch.equal(probe.logits(alone, ids_of()), probe.logits(serving.load(release)[0], ids_of()))


@every_chain
def test_the_adapted_model_is_measured(method, chains):
    plan = chains(method)
    before, after = plan.steps[1], plan.steps[2]
    for metric in ("domain", "answers", "qa", "pairs"):
        assert after.evaluation(metric) is not None
    for metric in ("domain", "answers"):
        assert after.evaluation(metric).measure(None).value != before.evaluation(metric).measure(None).value
    assert after.evaluation("pairs").measure("reward_accuracy") is not None
    # The metric counts from the first token of the text, however many virtual ones come before it.
    assert after.evaluation("domain").measure(None).value < 2 * before.evaluation("domain").measure(None).value


def test_the_summary_says_that_it_is_base_and_adapter(chains):
    from flows.summary import summarise

    costs = {row[0]: row[1:] for row in summarise(chains("bottleneck")).costs}
    assert costs["hand-over error (logits)"][2] == "0.0e+00 (of 1e-04, base + adapter)"
    assert costs["stage"][2] == "ift · bottleneck"


def test_the_stable_link_names_the_folder_of_both(chains, tmp_path):
    from flows.release_link import point_to

    plan = chains("prefix_tuning")
    link = plan.store / MODEL
    point_to(plan.steps[-1].artifact.loadable, link)
    assert torch.equal(
        probe.logits(serving.load(link)[0], ids_of()),
        probe.logits(serving.load(plan.steps[2].artifact.path)[0], ids_of()),
    )
    with pytest.raises((OSError, ValueError)):  # a plain loader must not get the base alone
        AutoModelForCausalLM.from_pretrained(link)


def test_people_can_talk_to_it(chains, capsys):
    from stages.chat import converse

    converse(chains("prompt_tuning").steps[-1].artifact.loadable, "say the", 4)
    assert capsys.readouterr().out.strip()


def test_dpo_holds_the_reference_against_the_model_without_its_adapter(chains, project, run_spec, monkeypatch):
    from stages.dpo import Dpo

    chains("prompt_tuning")
    reference = Dpo._reference
    monkeypatch.setattr(Dpo, "_reference", lambda self, trainer, batch: reference(self, trainer, batch) + 1)
    file = project / "wrong.yaml"
    file.write_text(spec_text("{kind: prompt_tuning, virtual_tokens: 3}", "dpo"))
    with pytest.raises(StageFailed, match="the reference is not the model without its adapter"):
        run_spec(file)


def test_a_changed_or_missing_base_is_damage(chains, tmp_path):
    plan = chains("bottleneck")
    store = shutil.copytree(plan.store, tmp_path / "store", symlinks=True)
    stage = read(store / plan.steps[2].artifact.path.name)
    assert damage(stage) == []
    weights = stage.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40] ^= 1
    weights.write_bytes(content)
    assert damage(stage) == ["model.safetensors of its base was changed"]
    with pytest.raises(StageFailed, match="of its base was changed"):
        serving.load(stage.path)
    shutil.rmtree(stage.model.parent)
    with pytest.raises(StageFailed, match=r"the base that it belongs on .* is not in"):
        serving.load(stage.path)


def test_weights_that_would_be_rounded_are_refused(project, run_spec, tmp_path):
    text = spec_text("{kind: bottleneck, size: 2}", head=HEAD.partition("metrics:")[0] + "stages:\n", before="")
    text = text.replace("packing: false", "packing: false, weights_dtype: bfloat16")
    file = project / "rounded.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match="weights_dtype bfloat16 would round the base"):
        run_spec(file)
    load_plain(project / "base", torch.bfloat16).float().save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(project / "base" / name, tmp_path / "base")
    shutil.copytree(project / "data", tmp_path / "data")
    (tmp_path / "spec.yaml").write_text(text)
    plan = run_spec(tmp_path / "spec.yaml")
    assert plan.steps[1].artifact.manifest["record"]["hand_over"]["max_logit_error"] == 0


# What `validate` refuses, by line


def problems_of(folder: Path, text: str) -> str:
    file = folder / "refused.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as error:
        check_spec(*load_pipeline(file))
    return str(error.value)


def line_of(text: str, part: str) -> int:
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


@every_chain
def test_a_stage_that_another_follows_is_refused_with_the_alternatives(method, project):
    _, written = CHAINS[method]
    text = spec_text(written) + f"  - name: {MANNER}"
    found = problems_of(project, text)
    assert f"refused.yaml:{line_of(text, method)}:" in found
    assert f"what method {method} trains cannot be merged into a plain model, so no stage can follow" in found
    assert "make this the last stage, or take a method that merges, such as lora" in found


@pytest.mark.parametrize(
    ("method", "train", "complaint"),
    [
        ("prefix_tuning", "packing: true", "would see one another; set train.packing: false"),
        ("prompt_tuning", "packing: true", "would see one another; set train.packing: false"),
        ("prefix_tuning", "packing: false, gradient_checkpointing: true", "cannot recompute activations"),
    ],
)
def test_settings_that_a_method_cannot_take_are_refused(method, train, complaint, project):
    text = spec_text(CHAINS[method][1]).replace("packing: false", train)
    found = problems_of(project, text)
    assert complaint in found
    assert f":{line_of(text, 'gradient_checkpointing' if 'gradient' in train else method)}:" in found


@pytest.mark.parametrize("train", ["packing: none", "packing: wrapped"])
def test_cpt_may_go_without_packing_or_wrap(train, project):
    cpt = KNOWLEDGE.replace("{kind: lora, rank: 4}", "{kind: prefix_tuning}")
    (project / "cpt.yaml").write_text(f"{HEAD}  - name: {cpt.replace('batch_size: 4,', f'batch_size: 4, {train},')}")
    check_spec(*load_pipeline(project / "cpt.yaml"))
    assert "set train.packing: none" in problems_of(project, f"{HEAD}  - name: {cpt}")


def test_virtual_tokens_beyond_the_last_position_are_refused(project):
    found = problems_of(project, spec_text("{kind: prompt_tuning, virtual_tokens: 600}"))
    assert "method.virtual_tokens: 600 leave no position for text, as this model has 512; must be below 512" in found
    assert "-" not in found.partition("virtual_tokens: ")[2]
    text = spec_text("{kind: prompt_tuning, virtual_tokens: 400}")
    found = problems_of(project, text)
    assert "128 tokens and 400 virtual ones" in found
    assert "the longest sequence here is 112" in found
    assert f":{line_of(text, 'packing: false')}:" in found


def test_more_layers_than_the_model_has_are_refused(project):
    found = problems_of(project, spec_text("{kind: llama_adapter, layers: 3}"))
    assert "].method.layers: 3, and this model has 2; name 2 or fewer, or leave it out" in found
