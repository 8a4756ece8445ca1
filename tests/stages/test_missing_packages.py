"""Packages that a method or an optimizer needs and that are not installed: said before anything starts."""

import sys
from pathlib import Path

import pytest
import tiny
from headers import llama, write_headers
from methods_table import METHODS, method_of

from flows.cli import _run
from stages.methods.base import MethodSpec

STAGE = "    method: {kind: qlora, rank: 4}\n"
LINE = tiny.SPEC[: tiny.SPEC.index(STAGE)].count("\n") + 1


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound project without torch: only the headers of its base are real."""
    folder = tmp_path_factory.mktemp("packages")
    write_headers(folder / "base", llama(), num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    (folder / "base/chat_template.jinja").write_text(tiny.TEMPLATE)
    tiny.write_data(folder)
    return folder


def said(project: Path, capsys: pytest.CaptureFixture[str], text: str, command: str = "validate") -> list[str]:
    """What a command says is wrong with a spec, its advice apart; it leaves nothing behind."""
    spec = project / "spec.yaml"
    spec.write_text(text)
    before = sorted(project.rglob("*"))
    code = _run([command, str(spec)])
    lines = [line for line in capsys.readouterr().err.replace(f"{spec}:", "").splitlines() if "warning: " not in line]
    assert sorted(project.rglob("*")) == before
    assert code == (2 if lines else 0)
    return lines


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_validate_names_each_package_that_a_method_needs_and_that_is_not_there(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: MethodSpec
) -> None:
    for package in method.requires:
        monkeypatch.setitem(sys.modules, package, None)
    text = tiny.SPEC.replace(STAGE, f"    method: {method.model_dump_json(exclude_unset=True)}\n")
    needs = [line for line in said(project, capsys, text) if "needs the package" in line]
    assert needs == [
        f"{LINE}:5: stages[2].method: method {method.kind} needs the package {package}: pip install {package}"
        for package in method.requires
    ]


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_no_command_starts_what_could_not_end(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert method_of("qlora").requires == ("bitsandbytes",)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert said(project, capsys, tiny.SPEC, command) == [
        f"{LINE}:5: stages[2].method: method qlora needs the package bitsandbytes: pip install bitsandbytes"
    ]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_optimizers_of_a_package_need_it_too(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    text = tiny.SPEC.replace("kind: qlora", "kind: lora").replace(
        "max_steps: 10", f"max_steps: 10, optimizer: {optimizer}"
    )
    assert said(project, capsys, text) == [
        f"26:49: stages[2].train.optimizer: optimizer {optimizer} needs the package bitsandbytes: "
        "pip install bitsandbytes"
    ]
