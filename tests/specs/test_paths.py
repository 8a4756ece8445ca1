"""Where the paths of a spec may lead and what may lie there: `validate` looks, and opens nothing hostile."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from headers import GGUF_HEADER, llama, write_headers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specs.load import SpecError
from stages.check import read_spec
from stages.paths import irregular

pytestmark = pytest.mark.timeout(60)  # a pipe that is opened waits for its writer


class Field(NamedTuple):
    """A field that holds a path."""

    line: int
    old: str
    new: str
    """What takes the place of ``old`` in the tiny project's spec; NAME is the path."""
    file: str
    """A sound target, in the project and outside."""


SPECTRUM = "{kind: spectrum, top_percent: 50}"
FIELDS = {
    "model.path": Field(2, "path: base,", "path: NAME,", "base"),
    "model.gguf": Field(2, "path: base,", "gguf: NAME,", "base.gguf"),
    "model.chat_template": Field(2, "path: base,", "path: base, chat_template: NAME,", "chat.jinja"),
    "metrics.domain.data.path": Field(5, "data/heldout.jsonl", "NAME", "data/heldout.jsonl"),
    "metrics.pairs.data.path": Field(8, "data/pairs.heldout.jsonl", "NAME", "data/pairs.heldout.jsonl"),
    "metrics.qa.task": Field(7, "tasks/qa.yaml", "NAME", "tasks/qa.yaml"),
    "stages[0].method.scores": Field(12, SPECTRUM, "{kind: spectrum, scores: NAME}", "scores.json"),
    "stages[0].method.unfrozen": Field(12, SPECTRUM, "{kind: spectrum, unfrozen: NAME}", "chosen.yaml"),
    "stages[0].data[0].path": Field(13, "data/corpus.jsonl", "NAME", "data/corpus.jsonl"),
    "stages[1].data[0].path": Field(19, "data/instructions.jsonl", "NAME", "data/instructions*.jsonl"),
}
FILES = {name: field for name, field in FIELDS.items() if name != "model.path" and "*" not in field.file}


def write_files(folder: Path) -> None:
    """Everything that a path of a spec may name, sound."""
    write_headers(folder / "base", llama(), num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    tiny.write_data(folder)
    (folder / "base.gguf").write_bytes(GGUF_HEADER)
    (folder / "chat.jinja").write_text(tiny.TEMPLATE)
    module = "model.layers.0.mlp.up_proj"
    (folder / "scores.json").write_text(json.dumps({module: {"snr": 1.0, "type": "mlp.up_proj"}}))
    (folder / "chosen.yaml").write_text(f"unfrozen_parameters: [{module}]\n")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project, and another one beside it that holds the same. Read only, but for the spec and links."""
    folder = tmp_path_factory.mktemp("paths")
    for name in ("project", "outside"):
        (folder / name).mkdir()
        write_files(folder / name)
    (folder / "project/link").symlink_to(folder / "outside", target_is_directory=True)
    return folder


def errors(spec: Path, field: Field, name: str) -> list[str]:
    """What is said of the spec with ``name`` in a field; the folder of all places is left out."""
    assert field.old in tiny.SPEC
    spec.write_text(tiny.SPEC.replace(field.old, field.new.replace("NAME", json.dumps(name)), 1))
    try:
        read_spec(spec)
    except SpecError as error:
        return [line.removeprefix(f"{spec}:") for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize("name", FIELDS)
def test_a_relative_path_may_not_lead_out_of_the_folder_and_an_absolute_one_may(places: Path, name: str) -> None:
    spec, field = places / "project/spec.yaml", FIELDS[name]
    for inside in (field.file, f"data/../{field.file}", f"{places}/outside/{field.file}"):
        assert errors(spec, field, inside) == [], inside
    for written in (f"../outside/{field.file}", f"data/../../outside/{field.file}", f"link/{field.file}"):
        [error] = errors(spec, field, written)
        target = places / "outside" / field.file
        assert re.sub(r"^\d+:\d+: ", "", error) == (
            f"{name}: {written} leads to {target}, and a relative path stays in the spec's folder "
            f"({places}/project); if that place is meant, write the absolute path"
        )
        assert error.startswith(f"{field.line}:")


@pytest.mark.parametrize("name", FIELDS)
def test_a_link_to_a_place_outside_is_followed_before_it_is_judged(places: Path, name: str) -> None:
    spec, field = places / "project/spec.yaml", FIELDS[name]
    real = next((places / "outside").glob(field.file))
    link = places / "project" / f"linked{real.suffix}"
    link.symlink_to(real, target_is_directory=real.is_dir())
    try:
        pattern = link.name.replace("linked", "linke?") if "*" in field.file else link.name
        [error] = errors(spec, field, pattern)
        assert f"{name}: {pattern} leads to {real}, and a relative path stays in the spec's folder" in error
    finally:
        link.unlink()


def test_a_link_within_the_folder_is_fine(places: Path) -> None:
    link = places / "project/same.jsonl"
    link.symlink_to("data/corpus.jsonl")
    try:
        assert errors(places / "project/spec.yaml", FIELDS["stages[0].data[0].path"], "same.jsonl") == []
    finally:
        link.unlink()


def test_what_a_task_or_a_base_holds_may_not_lead_out_either(tmp_path: Path) -> None:
    write_files(tmp_path / "project")
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}\n")
    spec = tmp_path / "project/spec.yaml"
    task = tmp_path / "project/tasks/qa.yaml"
    for written in ("../../secret.jsonl", str(secret)):
        task.write_text(tiny.TASK.replace("qa.jsonl", written))
        [error] = errors(spec, FIELDS["metrics.qa.task"], "tasks/qa.yaml")
        assert error.startswith(f"7:23: metrics.qa.task: tasks/qa.yaml leads to {secret}, and a relative path stays")
        assert errors(spec, FIELDS["metrics.qa.task"], str(task)) == []
    task.write_text(tiny.TASK)
    template = tmp_path / "project/base/chat_template.jinja"
    template.symlink_to(secret)
    [error] = errors(spec, FIELDS["model.path"], "base")
    assert error.startswith(f"2:9: model.path: base leads to {secret}, and a relative path stays")


def piped(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    address = os.path.relpath(path)  # a socket's address has few characters
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (Path.mkdir, "not a regular file, but a folder; name the file in it"),
    "pipe": (piped, "not a regular file, but a pipe; write what comes out of it to a file"),
    "socket": (listening, "not a regular file, but a socket; write what comes out of it to a file"),
    "device": (endless, "not a regular file, but a device; write what comes out of it to a file"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.fixture
def project(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project of a test's own."""
    folder = shutil.copytree(places / "project", tmp_path / "p", symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_unopened_in_every_field(project: Path, kind: str) -> None:
    make, reason = KINDS[kind]
    for name, field in FILES.items():
        odd = project / f"odd{Path(field.file).suffix}"
        make(odd)
        found = errors(project / "spec.yaml", field, odd.name)
        assert len(found) == 1, (name, found)
        assert found[0].startswith(f"{field.line}:")
        assert f"{odd}: {reason}" in found[0] or f"{odd.name} leads to /dev/zero, and a rel" in found[0], name
        if odd.is_dir():
            odd.rmdir()
        else:
            odd.unlink(missing_ok=True)


def test_a_device_is_refused_by_its_absolute_path_too(project: Path) -> None:
    for name in ("model.gguf", "model.chat_template"):
        [error] = errors(project / "spec.yaml", FIELDS[name], "/dev/zero")
        assert error.endswith("/dev/zero: not a regular file, but a device; write what comes out of it to a file")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_base_with_a_pipe_in_it_is_refused_unopened(project: Path, file: str) -> None:
    (project / "base" / file).unlink(missing_ok=True)
    os.mkfifo(project / "base" / file)
    [error] = errors(project / "spec.yaml", FIELDS["model.path"], "base")
    assert error.startswith("2:")
    assert f"{project}/base/{file}: not a regular file, but a pipe" in error or "not a model: a checkpoint has" in error


def test_a_file_that_may_not_be_read_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything, so a mode proves nothing
    file = project / "data/corpus.jsonl"
    assert irregular(file) == f"{file}: cannot be read: Permission denied; let the user who runs trivium read it"


PIECES = [
    *("..", ".", "/", "~", "*", "**", "?", "[", "]", "!", "data", "base", "link", "corpus.jsonl", " ", "\\", "\n", "é"),
    *(".yaml", ".json", ".jsonl", ".csv", ".parquet", ".txt", "a" * 300, "/dev/zero", "/proc/self/mem", "://"),
]
NAMES = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=6).map("".join)


def searches_everything(name: str) -> bool:
    """Whether a path is a pattern for the whole machine: to search that takes long, as asked."""
    return name.startswith("/") and bool(set(name) & set("*?["))


@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(name=NAMES.filter(lambda name: not searches_everything(name)), field=st.sampled_from(list(FIELDS.values())))
def test_any_text_as_a_path_anywhere_raises_only_spec_errors(places: Path, name: str, field: Field) -> None:
    spec = places / "project/spec.yaml"
    for problem in errors(spec, field, name.encode(errors="replace").decode() + Path(field.file).suffix):
        assert "\n" not in problem
        assert len(problem) < 8_000
