"""Models by hub id and commit: read from a hub cache on this disk, as the hub's own library lays it out."""

import shutil
from pathlib import Path

import pytest
import tiny

from stages.errors import InvalidInput
from stages.pipeline import load_pipeline
from stages.plan import make_plan
from stages.run import run_job

pytestmark = pytest.mark.model
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--tiny" / "snapshots" / COMMIT
    shutil.copytree(base_model, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    return cache


def project(folder: Path, name: str, commit: str) -> Path:
    tiny.write_data(folder)
    spec = folder / "spec.yaml"
    source = f"model: {{hub: {name}, revision: {commit}, dtype: float32}}"
    spec.write_text(tiny.SPEC.replace("model: {path: base, dtype: float32}", source))
    return spec


def test_a_hub_model_is_copied_into_the_store_at_its_commit(hub: Path, tmp_path: Path) -> None:
    spec = project(tmp_path / "p", "owner/tiny", COMMIT)
    plan = make_plan(load_pipeline(spec)[0], spec.parent, tmp_path / "artifacts")
    artifact = run_job(plan.job(plan.steps[0]).model_copy(update={"measurements": ()}))
    assert artifact.manifest["inputs"]["hub"] == f"owner/tiny@{COMMIT}"
    assert (artifact.model / "model.safetensors").is_file()
    assert artifact.model.is_relative_to(artifact.path)


def test_a_hub_model_that_cannot_be_fetched_is_refused_with_what_to_do(hub: Path, tmp_path: Path) -> None:
    spec = project(tmp_path / "p", "owner/absent", COMMIT)
    plan = make_plan(load_pipeline(spec)[0], spec.parent, tmp_path / "artifacts")
    with pytest.raises(InvalidInput, match=r"owner/absent@01234567 cannot be fetched .*check the id and the revision"):
        run_job(plan.job(plan.steps[0]))
