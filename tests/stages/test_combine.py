"""Adding up what several SVF stages of one base learned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import write_data, write_model

from flows.cli import _run
from stages import combine as module
from stages import probe
from stages.artifact import MODEL, Artifact, find
from stages.combine import PROVENANCE, combine
from stages.errors import InvalidInput, StageFailed
from stages.model import load_plain

pytestmark = pytest.mark.model

SPEC = """\
name: {name}
model: {{path: {base}, dtype: float32}}
seed: {seed}
stages:
  - name: learn
    kind: cpt
    method: {method}
    data: [{{path: data/corpus.jsonl}}]
    train: {{learning_rate: 5e-2, max_steps: 4, sequence_length: 64, batch_size: 2, precision: float32}}
{more}"""
MORE = """\
  - name: more
    kind: cpt
    method: {kind: svf}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 5e-2, max_steps: 2, sequence_length: 64, batch_size: 2, precision: float32}
"""
SPECS = {
    "one": {"method": "{kind: svf}", "seed": 1, "more": MORE},
    "two": {"method": "{kind: svf, target_modules: attention}", "seed": 2},
    "three": {"method": "{kind: svft}", "seed": 3},
    "band": {"method": "{kind: svft, pattern: banded}", "seed": 3},
    "lora": {"method": "{kind: lora, rank: 4}", "seed": 3},
    "elsewhere": {"method": "{kind: svf}", "seed": 1, "base": "other"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory, run_spec) -> dict[str, Artifact]:
    """A published stage per spec, by the spec's name; `more` is the second stage of `one`. Read only."""
    folder = tmp_path_factory.mktemp("combine")
    for base, layers in (("base", 2), ("other", 1)):
        write_model(folder / base, layers=layers)
        model = load_plain(folder / base, torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(8)  # as drawn, logits are near zero
        model.save_pretrained(folder / base)
    write_data(folder)
    found = {}
    for name, settings in SPECS.items():
        spec = folder / f"{name}.yaml"
        spec.write_text(SPEC.format(**{"name": name, "base": "base", "more": ""} | settings))
        steps = run_spec(spec, until="more" if "more" in settings else "learn").steps
        found |= {name if step.name == "learn" else step.name: step.artifact for step in steps[1:-1]}
    return found


def base_of(artifact: Artifact) -> Path:
    return find(artifact.path.parent, artifact.manifest["inputs"]["parent"]).model


def logits(folder: Path, dtype=torch.float32) -> torch.Tensor:
    model = load_plain(folder, dtype)
    return probe.logits(model, probe.probe_ids(model)).float()


def change(artifact: Artifact) -> dict[str, torch.Tensor]:
    before = load_plain(base_of(artifact), torch.float32).state_dict()
    return {
        name: value - before[name] for name, value in load_plain(artifact.model, torch.float32).state_dict().items()
    }


def test_one_artifact_with_weight_one_is_that_artifact(published, tmp_path):
    part = published["one"]
    record = combine([part.path], [1.0], tmp_path / "out")
    wanted = load_plain(part.path / MODEL, torch.float32)
    found = load_plain(tmp_path / "out", torch.float32)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())
    assert found.generation_config.eos_token_id == wanted.generation_config.eos_token_id
    assert float((logits(tmp_path / "out") - logits(base_of(part))).abs().max()) > 0.05
    assert record["max_logit_error"] <= 1e-4
    assert (tmp_path / "out/chat_template.jinja").read_text() == (part.model / "chat_template.jinja").read_text()


def test_weighted_changes_add_up(published, tmp_path):
    parts = [published[name] for name in ("one", "two", "three")]
    weights = [0.5, 2.0, -1.0]
    record = combine([part.path for part in parts], weights, tmp_path / "out")
    base = load_plain(base_of(parts[0]), torch.float32).state_dict()
    changes = [change(part) for part in parts]
    found = load_plain(tmp_path / "out", torch.float32).state_dict()
    for name, value in found.items():
        wanted = base[name] + sum(weight * one[name] for weight, one in zip(weights, changes, strict=True))
        assert torch.allclose(value, wanted, atol=1e-5), name
    assert any(float(one["model.layers.0.self_attn.q_proj.weight"].abs().max()) > 1e-3 for one in changes)
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text()) == record
    assert record["parts"] == [
        {"artifact": part.path.name, "identity": part.identity, "weight": weight}
        for part, weight in zip(parts, weights, strict=True)
    ]
    assert record["base"] == parts[0].manifest["inputs"]["parent"]
    assert 0 <= record["max_logit_error"] <= 1e-4
    assert str(tmp_path) not in (tmp_path / "out" / PROVENANCE).read_text()


def test_weight_zero_is_the_base(published, tmp_path):
    combine([published["one"].path], [0.0], tmp_path / "out")
    base = load_plain(base_of(published["one"]), torch.float32).state_dict()
    found = load_plain(tmp_path / "out", torch.float32).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in found.items())


def test_the_precision_is_that_of_the_release(published, tmp_path):
    combine([published["one"].path], [1.0], tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    wanted = load_plain(published["one"].model, torch.float32).bfloat16().state_dict()
    found = load_plain(tmp_path / "out", torch.bfloat16).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("names", "weights", "complaint"),
    [
        ([], [], "name at least one"),
        (["one", "two"], [1.0], "2 artifacts and 1 weights"),
        (["one"], [float("nan")], "a weight is nan"),
        (["one", "one"], [1.0, 1.0], "named twice"),
        (["one", "elsewhere"], [1.0, 1.0], "did not start from one model"),
        (["one", "more"], [1.0, 1.0], "did not start from one model"),
        (["band"], [1.0], "trained with method svft with pattern banded; only svf"),
        (["one", "lora"], [1.0, 1.0], "trained with method lora; only svf"),
        (["base"], [1.0], "a base, not a stage"),
        (["nowhere"], [1.0], "not a published artifact"),
    ],
)
def test_what_does_not_add_up_is_refused(names, weights, complaint, published, tmp_path):
    one = published["one"]
    special = {"base": find(one.path.parent, one.manifest["inputs"]["parent"]).path, "nowhere": tmp_path / "nowhere"}
    folders = [special[name] if name in special else published[name].path for name in names]
    with pytest.raises(InvalidInput, match=complaint):
        combine(folders, weights, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(published, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="exists already"):
        combine([published["one"].path], [1.0], tmp_path)
    for place in (tmp_path / "missing/out", Path("/proc/out")):
        monkeypatch.setattr(module, "load_plain", None)  # refused before anything is loaded
        with pytest.raises(InvalidInput, match=r"is no folder; make it first|/proc: cannot be written to"):
            combine([published["one"].path], [1.0], place)
    with pytest.raises(InvalidInput, match="'int8' is not one of float32"):
        combine([published["one"].path], [1.0], tmp_path / "out", "int8")


def test_a_damaged_or_orphaned_artifact_is_refused(published, tmp_path):
    part = published["one"]
    alone = tmp_path / "store" / part.path.name
    shutil.copytree(part.path, alone)
    with pytest.raises(InvalidInput, match="is in none of their folders"):
        combine([alone], [1.0], tmp_path / "out")
    weights = alone / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StageFailed, match="damaged since it was published"):
        combine([alone], [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_sum_or_a_wrong_file_is_never_left_behind(published, tmp_path, monkeypatch):
    with pytest.raises(StageFailed, match="not finite"):
        combine([published["one"].path], [1e7], tmp_path / "out", "float16")
    save = module.save_plain

    def wrong(model, *rest, **settings):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1.0
        save(model, *rest, **settings)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] -= 1.0

    monkeypatch.setattr(module, "save_plain", wrong)
    with pytest.raises(StageFailed, match=r"up_proj\.weight differ"):
        combine([published["one"].path], [1.0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_was_added(published, tmp_path, capfd):
    folders = [str(published[name].path) for name in ("one", "two")]
    done = _run(["combine", *folders, "--to", str(tmp_path / "out"), "--weight", "1", "--weight", "0.5"])
    lines, noise = capfd.readouterr()
    assert (done, noise) == (0, "")
    assert "+1 x 01-learn-" in lines
    assert "+0.5 x 01-learn-" in lines
    assert (tmp_path / "out/config.json").is_file()
    assert _run(["combine", folders[0], "--to", str(tmp_path / "out")]) == 2
    assert "exists already" in capfd.readouterr().err
