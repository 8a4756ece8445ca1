"""Hostile pickles, wherever one could be opened: nothing of them runs, and the refusal says what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
from hostile import edit_json, in_archive, write_pickle, write_torch

from stages.errors import InvalidInput, StageFailed

pytestmark = pytest.mark.model
CONVERT = r"weights in a pickle.*save_pretrained\(FOLDER, safe_serialization=True\)"
HALF = "train: {learning_rate: 5e-3, max_steps: 4, sequence_length: 64, batch_size: 2, checkpoint_every: 2}"


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that a pickle makes when it is opened."""
    return tmp_path / "mark"


def test_the_pickles_of_these_tests_do_what_they_threaten(tmp_path, mark):
    import pickle

    import torch

    with write_pickle(tmp_path / "plain.bin", mark).open("rb") as file:
        pickle.load(file)
    assert mark.exists()
    mark.unlink()
    torch.load(write_torch(tmp_path / "torch.bin", mark), weights_only=False)
    assert mark.exists()


# As a model


@pytest.fixture
def bare(base_model, tmp_path) -> Path:
    """A base without its weights."""
    ignored = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(base_model, tmp_path / "p/base", ignore=ignored))


@pytest.mark.parametrize("write", [write_pickle, write_torch])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.pkl"])
def test_a_base_in_a_pickle_is_refused_by_name(write, name, bare, mark, run_spec):
    from stages.check import check_spec
    from stages.model import load_plain
    from stages.pipeline import load_pipeline

    write(bare / name, mark)
    tiny.write_data(bare.parent)
    spec = bare.parent / "spec.yaml"
    spec.write_text(tiny.SPEC)
    wanted = re.compile(rf"base/{re.escape(name)}: {CONVERT}")
    pipeline, document = load_pipeline(spec)
    with pytest.raises(Exception, match=wanted):
        check_spec(pipeline, document)
    with pytest.raises(InvalidInput, match=wanted):
        run_spec(spec)
    import torch

    with pytest.raises(InvalidInput, match=wanted):
        load_plain(bare, torch.float32)
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_neither_opened_nor_copied(base_model, tmp_path, mark, run_spec):
    base = Path(shutil.copytree(base_model, tmp_path / "p/base"))
    write_torch(base / "pytorch_model.bin", mark)
    write_torch(base / "training_args.bin", mark)
    tiny.write_data(tmp_path / "p")
    (tmp_path / "p/own.jinja").write_text(tiny.TEMPLATE)
    spec = tmp_path / "p/spec.yaml"
    spec.write_text(tiny.SPEC.replace("path: base,", "path: base, chat_template: own.jinja,"))
    plan = run_spec(spec, until="base")
    assert not list(plan.steps[0].artifact.path.rglob("*.bin"))
    assert not mark.exists()


def test_a_pickle_that_calls_itself_safetensors_is_refused(bare, mark):
    import torch

    from stages.model import load_plain

    write_torch(bare / "model.safetensors", mark)
    with pytest.raises(InvalidInput, match=r"model\.safetensors: not a whole safetensors file .*fetch it again"):
        load_plain(bare, torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors", "sub/x.safetensors"])
def test_an_index_that_leads_to_a_pickle_or_elsewhere_is_refused(name, base_model, tmp_path, mark):
    import torch

    from stages.model import load_plain

    base = Path(shutil.copytree(base_model, tmp_path / "base"))
    weights = [*torch.load(write_torch(tmp_path / "x.bin", mark), weights_only=False)]
    mark.unlink()
    write_torch((base / name).resolve(), mark)
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidInput, match=r"index\.json: names .*allowed are \*\.safetensors beside it"):
        load_plain(base, torch.float32)
    assert not mark.exists()


# As a parent


def test_a_parent_whose_weights_became_a_pickle_is_refused_though_its_manifest_was_made_to_fit(
    chain, tmp_path, mark, run_spec
):
    from stages.artifact import publish, read
    from stages.make import make_stage

    parent = chain.steps[1].artifact
    forged = Path(shutil.copytree(parent.path, tmp_path / "forged"))
    (forged / "model/model.safetensors").unlink()
    (forged / "manifest.json").unlink()
    write_torch(forged / "model/pytorch_model.bin", mark)
    publish(forged, tmp_path / parent.path.name, identity=parent.manifest["inputs"], record=parent.manifest["record"])
    assert read(tmp_path / parent.path.name) is not None
    job = chain.job(chain.steps[2]).model_copy(
        update={
            "start": str(tmp_path / parent.path.name),
            "work": str(tmp_path / "work"),
            "target": str(tmp_path / "t"),
        }
    )
    (tmp_path / "work").mkdir()
    with pytest.raises(InvalidInput, match=rf"model/pytorch_model\.bin: {CONVERT}"):
        make_stage(job, tmp_path / "work", {}, None)
    assert not mark.exists()


# As an adapter


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_in_a_pickle_is_refused(name, chain, base_model, tmp_path, mark):
    import torch

    from stages.serving import assemble

    adapter = Path(shutil.copytree(chain.steps[2].artifact.path / "adapter", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    write_torch(adapter / name, mark)
    with pytest.raises(InvalidInput, match=r"adapter: no adapter_model\.safetensors.*safe_serialization=True"):
        assemble(base_model, adapter, torch.float32)
    assert not mark.exists()


def test_an_adapter_whose_settings_name_a_module_is_refused(chain, base_model, tmp_path, mark, monkeypatch):
    import torch

    from stages.serving import assemble

    adapter = Path(shutil.copytree(chain.steps[2].artifact.path / "adapter", tmp_path / "adapter"))
    (tmp_path / "stranger.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    edit_json(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="stranger")
    with pytest.raises(InvalidInput, match=r"adapter_config\.json: megatron_config would import code"):
        assemble(base_model, adapter, torch.float32)
    assert not mark.exists()


# In a checkpoint of ours


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, run_spec) -> Path:
    """The spec of a stage that broke off after a sealed checkpoint. Copied by who changes it."""
    folder = tmp_path_factory.mktemp("interrupted")
    text = tiny.SPEC[: tiny.SPEC.index("  - name: answers")]
    text = re.sub(r"train: \{.*\}", HALF, text, count=1)
    text = re.sub(r"  (answers|qa|pairs|domain): .*\n", "", text)
    text = text.replace("metrics:\n", "").replace("    gates: [{metric: domain, improves_on: base, by: 1%}]\n", "")
    spec = tiny.write_project(folder / "p", text)
    run_spec(spec, until="base")
    from stages import make

    with pytest.MonkeyPatch.context() as patch:

        def broken(*_):
            raise StageFailed("broken off")

        patch.setattr(make, "hand_over", broken)
        with pytest.raises(StageFailed, match="broken off"):
            run_spec(spec)
    return spec


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "evil.pkl"])
@pytest.mark.parametrize("form", ["archive", "plain"])
def test_a_pickle_in_a_checkpoint_that_was_sealed_again_is_refused(name, form, interrupted, tmp_path, mark, run_spec):
    from stages import checkpoint

    spec, newest = _copied(interrupted, tmp_path)
    if form == "archive":
        in_archive(newest / name, mark, newest / "scheduler.pt")
    else:
        write_pickle(newest / name, mark)
    checkpoint.seal(newest)
    with pytest.raises(StageFailed, match=rf"checkpoint-\d+/{name}: .*nothing of it was run.*delete .*{newest.name}"):
        run_spec(spec)
    assert not mark.exists()


def test_what_the_trainer_never_reads_is_not_opened(interrupted, tmp_path, mark, run_spec):
    from stages import checkpoint

    spec, newest = _copied(interrupted, tmp_path)
    write_torch(newest / "training_args.bin", mark)
    checkpoint.seal(newest)
    assert run_spec(spec).steps[-1].artifact is not None
    assert not mark.exists()


def _copied(spec: Path, folder: Path) -> tuple[Path, Path]:
    """The project at the same place in a folder of the test's own, and its newest checkpoint."""
    own = Path(shutil.copytree(spec.parent, folder / "p"))
    for manifest in own.glob("runs/*/00-base-*"):
        shutil.rmtree(manifest)  # it refers to the base that was copied from
    newest = max(own.glob("runs/*/.work/*/checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return own / spec.name, newest
