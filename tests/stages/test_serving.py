"""Several stages' adapters on one base: equal to the merged models, alone and in one batch, or refused."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny import write_data, write_model

from stages import probe, serving
from stages.artifact import MODEL, read
from stages.chat import converse_with_adapters
from stages.errors import InvalidInput, StageFailed
from stages.log import quiet
from stages.methods.lora import Lora
from stages.model import load_plain
from stages.serving import BASE, with_adapters

pytestmark = pytest.mark.model

METHODS = {
    "plain": "{kind: lora, rank: 4}",
    "stable": "{kind: rslora, rank: 2}",
    "frozen": "{kind: lora_fa, rank: 3, target_modules: [q_proj, v_proj]}",
    "faster": "{kind: lora_plus, rank: 4}",
    "weighed": "{kind: dora, rank: 4}",
    "principal": "{kind: pissa, rank: 4}",
    "minor": "{kind: milora, rank: 3}",
    "basis": "{kind: olora, rank: 4, target_modules: attention}",
    "fitted": "{kind: loftq, rank: 4}",
    "four": "{kind: qlora, rank: 4}",
    "floats": "{kind: qlora, rank: 2, quantization: fp4}",
    "prefix": "{kind: prefix_tuning, virtual_tokens: 3}",
    "longer": "{kind: prefix_tuning, virtual_tokens: 5}",
    "lora": "{kind: lora, rank: 3}",
    "mlp": "{kind: lora, rank: 5}",
    "shared": "{kind: vera, rank: 4}",
    "other": "{kind: vera, rank: 4, target_modules: [q_proj, v_proj]}",
    "whole": "{kind: full}",
}
STAGE = """\
  - name: {name}
    kind: ift
    method: {method}
    data: [{{path: data/instructions.jsonl}}]
    train:
      {{learning_rate: 2e-2, max_steps: 2, sequence_length: 96, batch_size: 2, packing: false, precision: float32}}
"""
PROMPTS = ["say the", "say a much longer thing now", "sing"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def trained(project, run_spec):
    """A function: the artifact's folder of a stage by its name; `later` starts from what `plain` published."""
    found: dict[str, Path] = {}

    def artifact(name: str) -> Path:
        if name not in found:
            names = ["plain", "later"] if name == "later" else [name]
            stages = "".join(STAGE.format(name=one, method=METHODS.get(one, METHODS["plain"])) for one in names)
            file = project / f"{name}.yaml"
            file.write_text(f"name: tiny\nmodel: {{path: base, dtype: float32}}\nstages:\n{stages}")
            found[name] = run_spec(file, until=name).steps[len(names)].artifact.path
        return found[name]

    return artifact


@pytest.fixture(scope="module")
def served(trained):
    """A function: the adapters of stages by their names, loaded once."""
    found = {}

    def adapters(*names: str):
        if names not in found:
            found[names] = with_adapters([trained(name) for name in names])
        return found[names]

    return adapters


def ids_of(rows: int) -> torch.Tensor:
    return torch.randint(3, 300, (rows, 10), generator=torch.Generator().manual_seed(5))


def merged(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return probe.logits(serving.load(folder)[0], ids)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max())


FAMILIES = [
    ("plain", "stable", "frozen", "faster"),
    ("plain", "weighed"),
    ("plain", "principal", "minor", "basis"),
    ("four",),
    ("prefix", "longer"),
    ("shared",),
    ("lora", "mlp"),
]
"""The last ones are called like parts of the library's and the model's own names."""
every_family = pytest.mark.parametrize("names", FAMILIES, ids="-".join)


@every_family
def test_an_adapter_on_the_shared_base_is_the_model_that_its_stage_published(names, served, trained):
    adapters, ids = served(*names), ids_of(3)
    assert adapters.names == names
    found = {name: adapters.logits(ids, [name] * 3) for name in names}
    for name in names:
        assert far(found[name], merged(trained(name), ids)) <= 1e-4
        assert far(found[name], adapters.logits(ids, [BASE] * 3)) > 1e-3
    assert all(far(found[one], found[other]) > 1e-3 for one in names for other in names if one != other)


@every_family
def test_the_base_answers_as_the_start(names, served, project):
    found = served(*names).logits(ids_of(3), [BASE] * 3)
    plain = probe.logits(load_plain(project / "base", torch.float32), ids_of(3))
    difference = far(found, plain)
    if names == ("four",):  # what it was trained over: the dequantised weights
        assert 1e-3 < difference < 1
    else:
        assert difference == 0


@pytest.mark.parametrize("names", [FAMILIES[0], FAMILIES[2]], ids="-".join)
def test_rows_of_one_batch_have_their_own_adapters(names, served):
    adapters, ids = served(*names), ids_of(5)
    rows = [names[1], BASE, names[2], names[3], names[0]]
    mixed = adapters.logits(ids, rows)
    for number, name in enumerate(rows):
        assert far(mixed[number], adapters.logits(ids[number : number + 1], [name])[0]) <= 1e-5


@pytest.mark.parametrize("names", [FAMILIES[0], ("prefix",)], ids=len)
def test_a_batch_of_prompts_is_answered_as_one_by_one(names, served):
    adapters = served(*names)
    rows = [names[0], names[-1], names[-1] if names == ("prefix",) else BASE]
    alone = [adapters.generate([prompt], [name], 8)[0] for prompt, name in zip(PROMPTS, rows, strict=True)]
    assert adapters.generate(PROMPTS, rows, 8) == alone
    assert all(isinstance(answer, str) for answer in alone)


def test_the_active_adapter_answers_where_none_is_named(served):
    adapters, ids = served("plain", "weighed"), ids_of(2)
    by_name = {name: adapters.logits(ids, [name] * 2) for name in ("plain", "weighed", BASE)}
    assert adapters.active == "plain"
    for name in ("weighed", BASE, "plain"):
        adapters.switch(name)
        assert adapters.active == name
        assert torch.equal(adapters.logits(ids), by_name[name])
    adapters.logits(ids, ["weighed"] * 2)
    assert adapters.active == "plain"  # a call switches back


def test_the_base_is_loaded_once(trained, monkeypatch):
    loaded = []
    load = Lora.load_beneath
    monkeypatch.setattr(Lora, "load_beneath", lambda self, *start: loaded.append(start) or load(self, *start))
    with_adapters([trained(name) for name in ("plain", "stable", "frozen")])
    assert len(loaded) == 1


# What is refused


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("plain", "weighed"), r"weighed \(dora\): DoRA rescales"),
        (("prefix", "longer"), r"does not keep adapters of method prefix_tuning apart"),
        (("shared",), r"does not keep adapters of method vera apart"),
    ],
)
def test_a_mixed_batch_that_would_not_be_exact_is_refused(names, complaint, served):
    adapters = served(*names)
    with pytest.raises(InvalidInput, match=complaint):
        adapters.logits(ids_of(2), [names[0], BASE])
    with pytest.raises(InvalidInput, match="Ask one adapter at a time"):
        adapters.generate(["a", "b"], [names[-1], BASE])


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("fitted",), "method loftq changed the model beneath its adapter"),
        (("plain", "fitted"), "method loftq changed the model beneath its adapter"),
        (("whole",), "method full keeps no adapter; serve the model in"),
        (("plain", "later"), r"plain started from 00-base-\w+ and later from 01-plain-\w+"),
        (("plain", "four"), "plain was trained over the start's own weights and four over weights of quantization nf4"),
        (("four", "floats"), "quantization nf4, .* floats over weights of quantization fp4"),
        (("plain", "prefix"), "plain is an adapter of method lora and prefix of prefix_tuning"),
        (("shared", "other"), "PEFT cannot hold other beside shared"),
        (("plain", "plain"), "named twice"),
        ((), "at least one"),
    ],
)
def test_artifacts_that_have_no_base_in_common_are_refused(names, complaint, trained):
    with pytest.raises(InvalidInput, match=complaint):
        with_adapters([trained(name) for name in names])


def test_what_is_no_stage_with_an_adapter_is_refused(trained, tmp_path):
    folder = trained("plain")
    base = next(folder.parent.glob("00-base-*"))
    with pytest.raises(InvalidInput, match="base trained no adapter; name the folder of a stage"):
        with_adapters([base])
    with pytest.raises(InvalidInput, match="not an artifact"):
        with_adapters([tmp_path])
    alone = shutil.copytree(folder, tmp_path / folder.name)
    with pytest.raises(InvalidInput, match=r"the artifact that it started from \(\w{8}\) is not in"):
        with_adapters([alone])


def test_unknown_names_and_wrong_counts_are_refused(served):
    adapters = served("plain", "weighed")
    with pytest.raises(InvalidInput, match="no adapter 'plane'; there are: plain, weighed, base"):
        adapters.switch("plane")
    with pytest.raises(InvalidInput, match="2 prompts and 1 adapters"):
        adapters.generate(["a", "b"], ["plain"])
    assert adapters.active == "plain"


def test_a_damaged_artifact_is_refused(trained, tmp_path):
    store = trained("plain").parent
    shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns(".*"))
    folder = tmp_path / "store" / trained("plain").name
    file = folder / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(StageFailed, match=r"adapter_model\.safetensors was changed"):
        with_adapters([folder])


def test_what_does_not_answer_as_it_was_published_is_not_served(trained, monkeypatch):
    load = Lora.load_beneath

    def changed(self, *start):
        model = load(self, *start)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.add_(0.01)
        return model

    monkeypatch.setattr(Lora, "load_beneath", changed)
    with pytest.raises(InvalidInput, match="plain: the base with its adapter on is not what was published"):
        with_adapters([trained("plain")])


def test_stages_of_one_name_go_by_their_folders(trained, project, run_spec):
    file = project / "again.yaml"
    stage = STAGE.format(name="plain", method="{kind: lora, rank: 2}")
    file.write_text(f"name: tiny\nmodel: {{path: base, dtype: float32}}\nstages:\n{stage}")
    second = run_spec(file, until="plain").steps[1].artifact.path
    assert with_adapters([trained("plain"), second]).names == (trained("plain").name, second.name)


# Loading by one call


def test_a_merged_stage_loads_without_its_adapter(trained):
    folder = trained("plain")
    model, tokenizer = serving.load(folder)
    assert not hasattr(model, "peft_config")
    assert torch.equal(probe.logits(model, ids_of(2)), merged(folder / MODEL, ids_of(2)))
    assert tokenizer.chat_template
    assert read(folder).loadable == folder / MODEL
    assert serving.load(str(folder), torch.bfloat16)[0].dtype == torch.bfloat16


def test_an_adapter_is_cast_with_its_base(trained):
    model, _ = serving.load(trained("prefix"), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert far(probe.logits(model, ids_of(2)).float(), merged(trained("prefix"), ids_of(2))) < 0.1


def test_a_folder_that_is_neither_model_nor_artifact_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"no config\.json, so no model"):
        serving.load(tmp_path)


# The command


def rows_file(folder: Path, *rows: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return file


@pytest.mark.parametrize("names", [("plain", "stable"), ("plain", "weighed")], ids="-".join)
def test_the_command_answers_a_file_by_adapter_in_its_order(names, trained, served, tmp_path, capsys):
    rows = [names[1], names[0], BASE] * 4
    asked = [{"prompt": PROMPTS[number % 3], "adapter": name} for number, name in enumerate(rows)]
    converse_with_adapters([trained(name) for name in names], rows_file(tmp_path, *asked), 4)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{key: row[key] for key in ("prompt", "adapter")} for row in found] == asked
    for row in found[:3]:
        assert row["answer"] == served(*names).generate([row["prompt"]], [row["adapter"]], 4)[0]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "adapter": "plane"}, r"prompts\.jsonl:2: no adapter 'plane'; there are: plain, base"),
        ({"prompt": "a"}, r"prompts\.jsonl:2: a row has two texts"),
        ({"prompt": 3, "adapter": "plain"}, r"prompts\.jsonl:2: a row has two texts"),
        ("[", r"prompts\.jsonl:2: not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(row, complaint, trained, tmp_path):
    file = rows_file(tmp_path, {"prompt": "a", "adapter": "plain"}, row)
    with pytest.raises(InvalidInput, match=complaint):
        converse_with_adapters([trained("plain")], file, 4)


def test_a_file_that_is_missing_or_empty_is_refused(trained, tmp_path):
    with pytest.raises(InvalidInput, match="cannot be read"):
        converse_with_adapters([trained("plain")], tmp_path / "none.jsonl", 4)
    with pytest.raises(InvalidInput, match="no rows"):
        converse_with_adapters([trained("plain")], rows_file(tmp_path), 4)


def test_in_the_terminal_a_line_switches(trained, served, monkeypatch, capsys):
    lines = iter(["say the", "/use weighed", "say the", "/use nobody", "/use base", "say the", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse_with_adapters([trained("plain"), trained("weighed")], None, 4)
    found = capsys.readouterr()
    adapters = served("plain", "weighed")
    wanted = [adapters.generate(["say the"], [name], 4)[0] for name in ("plain", "weighed", BASE)]
    assert found.out == "".join(f"{answer}\n" for answer in wanted)
    assert "no adapter 'nobody'; there are: plain, weighed, base" in found.err


def test_the_command_line_takes_several_artifacts(trained, tmp_path, capsys):
    from flows.cli import app

    file = rows_file(tmp_path, {"prompt": "say the", "adapter": "stable"})
    arguments = ["adapters", str(trained("plain")), str(trained("stable")), "--prompts", str(file), "--max-tokens", "3"]
    app(arguments, exit_on_error=False, result_action="return_none")
    assert json.loads(capsys.readouterr().out)["adapter"] == "stable"


def test_commands_that_answer_people_say_nothing_else(trained, tmp_path):
    """No progress bars, no advice of libraries: 4-bit kernels that are not installed, deprecations."""
    file = rows_file(tmp_path, {"prompt": "say the", "adapter": "four"})
    for arguments in (["adapters", trained("four"), "--prompts", file], ["chat", trained("plain"), "say the"]):
        command = [sys.executable, "-m", "flows.cli", *map(str, arguments), "--max-tokens", "3"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1


def test_a_quiet_moment_ends():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet():
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
        warnings.warn("of a library", FutureWarning, stacklevel=1)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    with pytest.warns(FutureWarning, match="heard"):
        warnings.warn("heard", FutureWarning, stacklevel=1)
