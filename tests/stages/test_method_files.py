"""Files that a method reads are found at `validate` and are part of what a stage is known by."""

import pytest
from tiny import SPEC, write_data, write_rows

from specs.load import SpecError
from stages.check import check_spec
from stages.pipeline import load_pipeline
from stages.plan import make_plan

LIST = "unfrozen_parameters:\n- model.layers.0.mlp.up_proj\n"


@pytest.fixture
def spec(tmp_path):
    write_data(tmp_path)
    write_rows(tmp_path / "base/model.safetensors", [])
    (tmp_path / "base/config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("{kind: spectrum, top_percent: 50}", "{kind: spectrum, unfrozen: chosen.yaml}"))
    (tmp_path / "chosen.yaml").write_text(LIST)
    return path


def identities(spec):
    pipeline, _ = load_pipeline(spec)
    return [step.key for step in make_plan(pipeline, spec.parent, spec.parent / "runs").steps]


def test_another_content_makes_the_stage_and_those_after_it_stale(spec):
    before = identities(spec)
    (spec.parent / "chosen.yaml").write_text(LIST.replace("layers.0", "layers.1"))
    after = identities(spec)
    assert before[0] == after[0]
    assert not set(before[1:]) & set(after[1:])


def test_a_missing_file_is_named_with_its_line(spec):
    (spec.parent / "chosen.yaml").unlink()
    pipeline, document = load_pipeline(spec)
    with pytest.raises(SpecError) as caught:
        check_spec(pipeline, document)
    line = 1 + spec.read_text().splitlines().index("    method: {kind: spectrum, unfrozen: chosen.yaml}")
    [found] = [str(problem) for problem in caught.value.problems if "chosen.yaml" in str(problem)]
    assert found.startswith(f"{spec}:{line}:")
    assert found.endswith("chosen.yaml: no such file")
