"""The README's spec and snippet are what the project really takes."""

import re
from pathlib import Path

from methods_table import KINDS

from stages.pipeline import load_pipeline

README = Path(__file__).parents[1] / "README.md"


def yaml_blocks() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_spec_in_the_readme_is_valid(tmp_path: Path) -> None:
    text = yaml_blocks()[0]
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    pipeline, _ = load_pipeline(spec)
    assert [(stage.kind, stage.method.kind) for stage in pipeline.stages] == [
        ("cpt", "spectrum"),
        ("ift", "lora"),
        ("dpo", "qlora"),
    ]


def test_the_method_lines_in_the_readme_are_valid(tmp_path: Path) -> None:
    spec, lines = yaml_blocks()
    for line in lines.strip().splitlines():
        file = tmp_path / "spec.yaml"
        file.write_text(spec.replace("method: {kind: lora, rank: 64}", line))
        pipeline, _ = load_pipeline(file)
        assert f"kind: {pipeline.stages[1].method.kind}" in line


def test_the_table_of_methods_has_every_method_once() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(KINDS)


def test_the_commands_in_the_readme_exist() -> None:
    from flows.cli import app

    named = set(re.findall(r"`trivium (\w+)", README.read_text()))
    assert named
    assert named <= set(app)


def test_the_readme_opens_with_the_two_commands() -> None:
    lines = README.read_text().splitlines()
    targets = set(re.findall(r"^([a-z-]+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE))
    assert [line.split()[2] for line in lines[3:5]] == ["demo", "test"]
    assert {"demo", "demo-gate", "test", "check"} <= targets


def test_the_policies_in_the_readme_are_valid(tmp_path: Path) -> None:
    policies = re.findall(r"^(on_gate_failure: .+?)  +#", README.read_text(), flags=re.MULTILINE)
    assert len(policies) == 3
    gates = "    gates: [{metric: pairs, at_least: 0.6}]\n"
    spec = yaml_blocks()[0]
    assert spec.endswith(gates)
    for line in policies:
        file = tmp_path / "spec.yaml"
        file.write_text(f"{spec}    {line}\n")
        load_pipeline(file)
