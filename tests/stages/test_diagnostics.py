"""What training did to the weights: known answers for one matrix, and every method's update in a real stage."""

import json
import math
from pathlib import Path

import pytest
import torch
from architectures import write_architecture
from methods_table import MERGEABLE, label
from safetensors.torch import load_file, save_file
from tiny import write_data, write_model

from flows.cli import _run
from stages.artifact import Artifact
from stages.diagnostics import matrix
from stages.diagnostics.lineage import directions
from stages.diagnostics.planned import Planned, planned_of, selected_in
from stages.diagnostics.stage import LATER, diagnostics_of
from stages.diagnostics.update import FILE, diagnose
from stages.diagnostics.weights import of_checkpoint
from stages.errors import InvalidInput, StageFailed
from stages.methods.base import Start
from stages.model import load_plain

pytestmark = pytest.mark.model


def weight(rows=200, columns=120, seed=0) -> torch.Tensor:
    """A matrix with a decaying spectrum, as trained ones have."""
    drawn = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, columns, generator=drawn))[0]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=drawn))[0]
    return left * torch.exp(-torch.arange(columns) / 30.0) @ right


def low_rank(rank: int, like: torch.Tensor, scale=1e-3) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(7)
    rows, columns = like.shape
    return scale * torch.randn(rows, rank, generator=drawn) @ torch.randn(rank, columns, generator=drawn)


def test_equal_directions_count_as_many_and_one_counts_as_one():
    equal = torch.zeros(40, 60)
    equal[:5, :5] = 0.1 * torch.eye(5)
    found = matrix.spectrum(equal, 0.0)
    assert found.effective_rank == pytest.approx(5)
    assert found.stable_rank == pytest.approx(5)
    assert found.values[:5] == pytest.approx([0.1] * 5)
    one = matrix.spectrum(torch.outer(torch.ones(40), torch.ones(60)), 0.0)
    assert one.effective_rank == pytest.approx(1, abs=1e-6)
    assert one.values == pytest.approx([math.sqrt(2400)])


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_an_update_of_rank_r_has_no_more_directions_however_the_sum_was_rounded(scale):
    before = weight()
    after = before + low_rank(4, before, scale)
    found = matrix.spectrum(after - before, matrix.rounding_of(after))
    assert 3 < found.effective_rank <= 4.01
    assert len(found.values) == 4


def test_a_large_matrix_s_rank_is_estimated_near_the_exact_one(monkeypatch):
    noise = torch.randn(400, 500, generator=torch.Generator().manual_seed(1))
    exact = matrix.spectrum(noise, 0.0)
    monkeypatch.setattr(matrix, "EXACT", 100)
    estimate = matrix.spectrum(noise, 0.0)
    assert not exact.estimated
    assert estimate.estimated
    assert estimate.effective_rank == pytest.approx(exact.effective_rank, rel=0.15)
    assert estimate.stable_rank == pytest.approx(exact.stable_rank, rel=0.05)
    assert matrix.spectrum(low_rank(4, noise), 1e-9).effective_rank == pytest.approx(4, abs=0.5)
    assert not matrix.spectrum(low_rank(4, noise), 1e-4).estimated


def test_a_planted_direction_is_an_intruder_and_scaling_or_a_small_change_is_none():
    before = weight()
    planted = torch.linalg.qr(torch.randn(200, 121, generator=torch.Generator().manual_seed(3)))[0]
    basis = torch.linalg.svd(before, full_matrices=False)[0]
    new = planted[:, 0] - basis @ (basis.T @ planted[:, 0])  # like none of the start's directions
    new /= new.norm()
    right = torch.linalg.svd(before, full_matrices=False)[2][50]
    assert matrix.intruders(before, before + 2.0 * torch.outer(new, right)) == 1
    assert matrix.intruders(before, 3.0 * before) == 0
    assert matrix.intruders(before, before + 1e-4 * torch.randn_like(before)) == 0


@pytest.mark.parametrize("side", [120, 300])
def test_intruders_are_those_of_the_full_decomposition(side):
    before = weight(320, side)
    after = before + low_rank(6, before, 0.02)
    every = torch.linalg.svd(before, full_matrices=False)[0]
    top = torch.linalg.svd(after, full_matrices=False)[0][:, : matrix.TOP]
    wanted = int(((every.T @ top).abs().max(dim=0).values < matrix.EPSILON).sum())
    assert wanted > 0
    assert matrix.intruders(before, after) == wanted


def test_what_cannot_be_told_of_a_large_matrix_is_not_told(monkeypatch):
    monkeypatch.setattr(matrix, "SETTLED", 100)
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    assert matrix.intruders(noise, noise + torch.randn_like(noise)) is None


def test_no_draw_of_the_training_s_is_used_up():
    state = torch.get_rng_state()
    matrix.intruders(weight(300, 300), weight(300, 300, seed=1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


def moved(base: Path, folder: Path, change) -> Path:
    model = load_plain(base, torch.float32)
    with torch.no_grad():
        change(dict(model.named_parameters()))
    model.save_pretrained(folder)
    return folder


def test_shares_norms_and_places_of_a_change_that_is_known(base, tmp_path):
    def change(weights):
        weights["model.layers.0.mlp.up_proj.weight"].add_(0.01)  # 64 x 32 numbers
        weights["model.layers.1.self_attn.q_proj.weight"].add_(0.02)  # 32 x 32
        weights["model.norm.weight"].add_(0.1)  # 32

    found = diagnose(of_checkpoint(base), moved(base, tmp_path / "after", change), "spectra")
    up, query, norm = 2048 * 0.01**2, 1024 * 0.02**2, 32 * 0.1**2
    whole = up + query + norm
    assert found["norm"] == pytest.approx(math.sqrt(whole), rel=1e-3)
    assert found["layers"] == pytest.approx({"0": up / whole, "1": query / whole}, rel=1e-3)
    assert found["types"] == pytest.approx({"mlp.up_proj": up / whole, "self_attn.q_proj": query / whole}, rel=1e-3)
    assert found["outside"] == pytest.approx(norm / whole, rel=1e-3)
    assert [row["name"] for row in found["others"]] == ["model.norm.weight"]
    assert [row["effective_rank"] for row in found["matrices"]] == pytest.approx([1, 1], abs=1e-2)
    assert found["unchanged"] == 12
    assert found["unplanned"] is None
    up_only = Planned(frozenset({(0, "mlp.up_proj", None)}), frozenset({"norm.weight"}), selected=True)
    planned = diagnose(of_checkpoint(base), tmp_path / "after", "norms", up_only)
    assert planned["unplanned"] == pytest.approx(query / whole, rel=1e-3)
    assert {row["name"]: row["planned"] for row in planned["matrices"]} == {
        "model.layers.0.mlp.up_proj": True,
        "model.layers.1.self_attn.q_proj": False,
    }
    assert {row["effective_rank"] for row in planned["matrices"]} == {None}


METHODS_WITHOUT_ROWS = [method for method in MERGEABLE if method.kind != "lq_lora"]
"""All that merge but one, which looks at the stage's rows first; its names are those of loftq."""


@pytest.mark.parametrize("method", METHODS_WITHOUT_ROWS, ids=label)
def test_what_a_method_was_to_train_is_what_its_merge_changes(method, base, tmp_path):
    """From the names of its parameters, whatever they are called: so nothing of the update lies outside."""
    start = Start(base, cache=tmp_path, sequence_length=64)
    prepared = method.prepare(method.load(base, torch.float32, torch.float32), start)
    before = of_checkpoint(base)
    if not method.starts_exactly:
        method.finish(prepared.model, start).save_pretrained(tmp_path / "untrained")
        before = of_checkpoint(tmp_path / "untrained")
        prepared = method.prepare(method.load(base, torch.float32, torch.float32), start)
    with torch.no_grad():
        for name, parameter in prepared.model.named_parameters():
            if name in prepared.trainable:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    method.finish(prepared.model, start).save_pretrained(tmp_path / "merged")
    after = of_checkpoint(tmp_path / "merged")
    planned = planned_of(prepared.trainable, prepared.record, after)
    found = diagnose(before, tmp_path / "merged", "norms", planned)
    assert found["unplanned"] == 0.0
    assert {row["name"] for row in found["matrices"]} == {after.matrices[key].module for key in planned.matrices}
    assert {row["name"] for row in found["others"]} == {after.others[place] for place in planned.others}
    assert found["norm"] > 0


def renamed(folder: Path, to: Path, rename) -> Path:
    """The same checkpoint with other names of its tensors."""
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, to / "model.safetensors")
    return to


def test_names_without_what_stands_before_them_are_the_same_weights(tmp_path):
    """As the hub has GPT-2: `h.0.ln_1.weight`, which is `transformer.h.0.ln_1.weight` once it is saved again."""
    new = write_architecture("gpt2", tmp_path / "new")
    old = renamed(new, tmp_path / "old", lambda name: name.removeprefix("transformer."))
    found = diagnose(of_checkpoint(old), new, "norms")
    assert found["norm"] == 0.0
    assert found["unchanged"] == 3 * 6  # queries, keys and values apart
    assert directions(["one"], [old, new])["relative_from_base"] == 0.0


def test_experts_that_are_stored_one_by_one_are_those_of_a_bank(tmp_path):
    model = write_architecture("mixtral", tmp_path / "model")
    before = of_checkpoint(model)
    bank = "model.layers.1.mlp.experts.gate_up_proj"  # as it is called in memory
    planned = planned_of([bank], {}, before)
    assert planned.matrices >= {(1, "experts.gate", 0), (1, "experts.up", 3)}
    assert {layer for layer, _, _ in planned.matrices} == {1}


def test_models_that_cannot_be_told_apart_are_refused(base, tmp_path):
    two = tmp_path / "two"
    two.mkdir()
    (two / "config.json").write_text((base / "config.json").read_text())
    tensors = load_file(base / "model.safetensors")
    second = {f"vision.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | second, two / "model.safetensors")
    with pytest.raises(InvalidInput, match="two stacks of layers"):
        of_checkpoint(two)
    fewer = renamed(base, tmp_path / "fewer", lambda name: name.replace("layers.1.", "layers.2."))
    with pytest.raises(InvalidInput, match=r"of layer 1 is in one of start and .* only"):
        diagnose(of_checkpoint(base), fewer, "norms")


def test_rows_are_outputs_however_a_weight_is_stored(tmp_path):
    """gpt-oss and Llama 4 keep experts as (inputs, outputs), GPT-2 all of its layers."""
    folder = tmp_path / "oss"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt_oss", "num_attention_heads": 4, "hidden_size": 8}')
    down, both = torch.randn(2, 6, 8), torch.randn(2, 8, 12)
    names = (f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj"))
    save_file(dict(zip(names, (down, both), strict=True)), folder / "model.safetensors")
    found = of_checkpoint(folder)
    assert torch.equal(found.matrix((0, "experts.down", 1)).cpu(), down[1].T)
    assert torch.equal(found.matrix((0, "experts.up", 1)).cpu(), both[1].T[1::2])
    gpt2 = of_checkpoint(write_architecture("gpt2", tmp_path / "gpt2"))
    assert gpt2.matrix((0, "mlp.c_fc", None)).shape == (128, 32)


def test_a_later_update_that_goes_back_has_a_cosine_of_minus_one(base, tmp_path):
    def change(amount):
        return lambda weights: weights["model.layers.0.mlp.up_proj.weight"].add_(amount)

    there = moved(base, tmp_path / "there", change(0.5))
    half = moved(base, tmp_path / "half", change(0.25))
    found = directions(["one", "two", "three"], [base, there, half, half])
    assert found["cosines"][0][1] == pytest.approx(-1, abs=1e-5)
    assert found["cosines"][0][2] is None
    assert found["from_base"] == pytest.approx(0.25 * math.sqrt(2048), rel=1e-4)
    assert found["norms"] == pytest.approx([0.5 * math.sqrt(2048), 0.25 * math.sqrt(2048), 0.0], rel=1e-4)


SPEC = """\
name: told
model: {path: base, dtype: float32}
seed: 1
HEADstages:
  - name: knowledge
    kind: cpt
    method: {kind: spectrum, top_percent: 50}
    data: [{path: data/corpus.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 2, sequence_length: 48, batch_size: 2, precision: float32}
  - name: answers
    kind: ift
    method: {kind: METHOD}
    data: [{path: data/instructions.jsonl}]
    train: {learning_rate: 1e-2, max_steps: 2, sequence_length: 48, batch_size: 2, precision: float32, packing: false}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    write_model(folder / "base")
    write_data(folder)
    return folder


def written(project: Path, method: str, head: str = "") -> Path:
    spec = project / "spec.yaml"
    spec.write_text(SPEC.replace("METHOD", method).replace("HEAD", head))
    return spec


def published(plan) -> list[Artifact]:
    return [step.artifact for step in plan.steps if step.stage is not None]


def test_a_chain_s_stages_each_keep_what_they_changed(project, run_spec, capsys):
    spec = written(project, "lora, rank: 2")
    knowledge, answers = published(run_spec(spec))
    first = json.loads((knowledge.path / FILE).read_text())
    assert first["unplanned"] == 0.0
    chosen = selected_in(json.loads((knowledge.path / "training.json").read_text())["method"])
    assert {(row["layer"], row["type"], row["expert"]) for row in first["matrices"]} == chosen
    second = json.loads((answers.path / FILE).read_text())
    assert second["unplanned"] == 0.0
    assert {row["planned"] for row in second["matrices"]} == {None}  # it selects none
    assert answers.manifest["record"]["diagnostics"]["seconds"] >= 0
    assert len(second["matrices"]) == 14
    assert max(row["effective_rank"] for row in second["matrices"]) <= 2.01
    assert second["lineage"]["names"] == ["knowledge", "answers"]
    assert second["lineage"]["norms"] == pytest.approx([first["norm"], second["norm"]], rel=1e-6)
    assert _run(["diagnose", str(spec), "--root", str(knowledge.path.parent.parent)]) == 0
    said = capsys.readouterr().out
    assert "14 of 14" in said
    assert "cosine between the updates" in said


def test_quantising_is_told_apart_from_what_was_learned(project, run_spec):
    _, answers = published(run_spec(written(project, "qlora, rank: 2")))
    found = diagnostics_of(answers)
    assert found["against"] == "dequantised start"
    assert max(row["effective_rank"] for row in found["matrices"]) <= 2.01
    assert found["rounding"]["norm"] > 0
    assert not found["others"]


def test_what_changes_no_weights_says_so(project, run_spec):
    _, answers = published(run_spec(written(project, "prompt_tuning, virtual_tokens: 2")))
    found = diagnostics_of(answers)
    assert "prompt_tuning changes no weights" in found["reason"]
    assert found["matrices"] == []


def test_switched_off_nothing_is_kept_and_diagnose_makes_it_beside(project, run_spec, capsys):
    plan = run_spec(written(project, "lora, rank: 3", "diagnostics: off\n"))
    knowledge, answers = published(plan)
    assert not (answers.path / FILE).exists()
    spec = written(project, "lora, rank: 3")
    assert _run(["diagnose", str(spec), "--root", str(knowledge.path.parent.parent)]) == 0
    assert "14 of 14" in capsys.readouterr().out
    found = diagnostics_of(answers)
    assert found["depth"] == "spectra"
    assert found["unplanned"] == 0.0
    assert not (answers.path / FILE).exists()
    (kept,) = (file for file in (answers.path.parent / LATER).iterdir() if answers.identity.startswith(file.stem))
    kept.write_text(kept.read_text().replace('"spectra"', '"norms"'))
    assert diagnostics_of(answers) is None  # changed by hand: its seal does not match
    assert _run(["diagnose", str(spec), "--root", str(knowledge.path.parent.parent)]) == 0
    assert diagnostics_of(answers) == found


def test_norms_that_a_stage_kept_give_way_to_spectra_made_later(project, run_spec, capsys, monkeypatch):
    _, answers = published(run_spec(written(project, "lora, rank: 5", "diagnostics: norms\n")))
    assert diagnostics_of(answers)["depth"] == "norms"
    spec, root = written(project, "lora, rank: 5"), answers.path.parent.parent
    assert _run(["diagnose", str(spec), "--root", str(root)]) == 0
    assert diagnostics_of(answers)["depth"] == "spectra"
    monkeypatch.setattr("stages.diagnostics.stage.diagnose_stage", None)  # nothing is compared a second time
    assert _run(["diagnose", str(spec), "--root", str(root)]) == 0


def test_diagnostics_that_fail_cost_no_stage(project, run_spec, monkeypatch, capsys):
    def broken(*_):
        raise StageFailed("no memory is left\nat all")

    monkeypatch.setattr("stages.make.diagnose_stage", broken)
    _, answers = published(run_spec(written(project, "lora, rank: 1")))
    assert answers is not None
    assert diagnostics_of(answers) is None
    said = capsys.readouterr().err
    assert "diagnostics of answers are left out: no memory is left; `trivium diagnose` tries again" in said


def test_diagnose_of_nothing_says_what_to_do(project, tmp_path, capsys):
    assert _run(["diagnose", str(written(project, "full")), "--root", str(tmp_path)]) == 2
    assert "no stage is published yet; `trivium run" in capsys.readouterr().err


def test_comparing_whole_models_is_no_part_of_a_stage_s_peak_memory(project, run_spec, monkeypatch):
    held = {"bytes": 1}
    monkeypatch.setattr("stages.make.peak_memory", lambda: held["bytes"])
    monkeypatch.setattr("stages.make.diagnose_stage", lambda *_: held.update(bytes=2) or {"reason": "compared"})
    spec = written(project, "full")
    spec.write_text(spec.read_text().replace("seed: 1", "seed: 9"))
    knowledge = run_spec(spec, until="knowledge").steps[1].artifact
    assert held["bytes"] == 2
    assert knowledge.manifest["record"]["peak_memory"] == 1
