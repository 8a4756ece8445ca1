"""Models that bring code: refused without a question, allowed by the very hash of it, checked at every load."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hostile import AUTO_MAP, edit_json, write_own_model

from specs.load import SpecError
from stages.check import check_spec
from stages.errors import InvalidInput
from stages.pipeline import load_pipeline
from stages.remote_code import allowing, code_digest, trusted

pytestmark = pytest.mark.model
OPT_IN = r"config\.json: the model brings Python code \(modeling_own\.OwnConfig.*read the \*\.py files in .*set "
ONE_STAGE = tiny.SPEC[: tiny.SPEC.index("  - name: answers")]


@pytest.fixture
def mark(tmp_path) -> Path:
    """The file that the model's code makes when it runs."""
    return tmp_path / "mark"


@pytest.fixture
def base(tmp_path, mark, monkeypatch) -> Path:
    """A model with code, in a project; code that runs is copied into a cache of the test's own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", None)  # nobody is there to be asked
    known = set(sys.modules)
    yield write_own_model(tmp_path / "p/base", mark)
    for name in set(sys.modules) - known:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def project(base: Path, digest: str | None = None) -> Path:
    tiny.write_data(base.parent)
    spec = base.parent / "spec.yaml"
    allowed = "" if digest is None else f", allow_remote_code: {digest}"
    spec.write_text(ONE_STAGE.replace("dtype: float32}", f"dtype: float32{allowed}}}"))
    return spec


# Refused


def test_code_is_refused_with_its_digest_before_anything_is_loaded(base, mark):
    pipeline, document = load_pipeline(project(base))
    opt_in = rf"{OPT_IN}model\.allow_remote_code: {code_digest(base)}"
    with pytest.raises(SpecError, match=rf"spec\.yaml:2:\d+: model\.path: .*{opt_in}"):
        check_spec(pipeline, document)
    assert not mark.exists()


def test_it_is_refused_in_a_moment_without_torch(base, mark):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from stages.remote_code import trusted; from stages.errors import InvalidInput\n"
        "began = time.process_time()\n"
        "try: trusted(Path(sys.argv[1]))\n"
        "except InvalidInput: print(time.process_time() - began, {'torch', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    seconds, heavy = done.stdout.split()
    assert heavy == "set()"
    assert float(seconds) < 0.1
    assert not mark.exists()


def test_a_job_refuses_it_too(base, mark, run_spec):
    with pytest.raises(InvalidInput, match=OPT_IN):
        run_spec(project(base))
    assert not mark.exists()


@pytest.mark.parametrize("load", ["load_tokenizer", "load_config", "load_plain"])
def test_no_door_runs_it(load, base, mark):
    import torch

    from stages import model

    settings = (torch.float32,) if load == "load_plain" else ()
    with pytest.raises(InvalidInput, match=OPT_IN):
        getattr(model, load)(base, *settings)
    assert not mark.exists()


def test_counting_refuses_it(base, mark):
    from stages.count import meta_model

    with pytest.raises(InvalidInput, match=OPT_IN):
        meta_model(base)
    assert not mark.exists()


def test_a_wrong_digest_is_refused_with_both(base, mark, run_spec):
    spec = project(base, "a" * 64)
    both = rf"sha256 {code_digest(base)}, and the spec allows {'a' * 64} \(model\.allow_remote_code\)"
    with pytest.raises(SpecError, match=rf"spec\.yaml:2:\d+: model\.allow_remote_code: .*{both}"):
        check_spec(*load_pipeline(spec))
    with pytest.raises(InvalidInput, match=both):
        run_spec(spec)
    assert not mark.exists()


def test_code_that_changes_after_it_was_read_is_refused(base, mark, run_spec):
    spec = project(base, code_digest(base))
    (base / "more.py").write_text("more = 1\n")
    with pytest.raises(InvalidInput, match="they were changed, or are others than were read"):
        run_spec(spec)
    assert not mark.exists()


def test_code_of_another_repository_is_refused_whatever_the_spec_allows(base, mark):
    elsewhere = {name: f"owner/other--{found}" for name, found in AUTO_MAP.items()}
    edit_json(base / "config.json", auto_map=elsewhere)
    with allowing(code_digest(base)), pytest.raises(InvalidInput, match="code of another repository"):
        trusted(base)
    with pytest.raises(InvalidInput, match="code of another repository"):  # a digest to allow would lead nowhere
        trusted(base)


def test_code_that_is_not_there_is_asked_for_and_no_digest_of_nothing_is_offered(base):
    for file in base.glob("*.py"):
        file.unlink()
    for digest in (None, code_digest(base)):
        with allowing(digest), pytest.raises(InvalidInput, match="holds no Python files: fetch the model again"):
            trusted(base)


def test_a_digest_for_a_model_without_code_is_refused_as_inert(base_model, tmp_path):
    base = Path(shutil.copytree(base_model, tmp_path / "p/base"))
    with pytest.raises(SpecError, match=r"names no code in its config \(auto_map\).*remove model\.allow_remote_code"):
        check_spec(*load_pipeline(project(base, "a" * 64)))


# Not needed


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_model_that_transformers_serves_is_left_alone(file, base, mark):
    import torch

    from stages.model import load_plain, load_tokenizer

    edit_json(base / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    document = json.loads((base / "config.json").read_text())
    del document["auto_map"]
    (base / "config.json").write_text(json.dumps(document))
    named = AUTO_MAP if file == "config.json" else {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}
    edit_json(base / file, auto_map=named)
    check_spec(*load_pipeline(project(base)))
    assert type(load_plain(base, torch.float32)).__module__.startswith("transformers.")
    assert load_tokenizer(base).is_fast
    assert not mark.exists()


def test_the_model_types_of_transformers_are_read_as_it_knows_them():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from stages.remote_code import _own_model_types

    assert _own_model_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# Allowed


def test_allowed_code_travels_to_the_release_and_is_checked_at_every_load(base, mark, run_spec):
    from stages.artifact import read
    from stages.count import base_folder, stage_counts
    from stages.serving import load

    digest = code_digest(base)
    spec = project(base, digest)
    (base / "sub").mkdir()
    (base / "sub/unused.py").write_text("raise SystemExit('never imported')\n")
    digest = code_digest(base)
    spec = project(base, digest)
    check_spec(*load_pipeline(spec))
    assert not mark.exists()
    plan = run_spec(spec)
    assert mark.exists()
    for step in plan.steps:
        artifact = read(step.place)
        assert artifact.manifest["record"]["remote_code"] == digest
        assert code_digest(artifact.model) == digest
        assert json.loads((artifact.model / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert plan.steps[0].identity["allow_remote_code"] == digest
    assert base_folder(plan) is not None
    counted = stage_counts(plan)["knowledge"]
    assert counted.trainable, counted.reason
    release = plan.steps[-1].artifact
    with pytest.raises(InvalidInput, match="brings Python code"):
        load(release.path)
    with allowing(digest):
        assert type(load(release.path)[0]).__name__ == "OwnForCausalLM"


def test_people_talk_to_it_through_the_spec_that_allows_it(base, mark, run_spec, capsys):
    from flows.cli import _run

    spec = project(base, code_digest(base))
    run_spec(spec)
    root = ("--root", str(spec.parent / "runs"), "--max-tokens", "2")
    assert _run(["chat", str(spec), "hello", *root]) == 0
    release = next(spec.parent.glob("runs/*/??-release-*"))
    capsys.readouterr()
    assert _run(["chat", str(release), "hello", "--max-tokens", "2"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"the model brings Python code .*model\.allow_remote_code", told)
