"""The README's spec and snippet are what the project really takes."""

import re
from pathlib import Path

from stages.pipeline import load_pipeline

README = Path(__file__).parents[1] / "README.md"


def test_the_spec_in_the_readme_is_valid(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    pipeline, _ = load_pipeline(spec)
    assert [(stage.kind, stage.method.kind) for stage in pipeline.stages] == [
        ("cpt", "spectrum"),
        ("ift", "lora"),
        ("dpo", "qlora"),
    ]


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
