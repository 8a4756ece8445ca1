"""Manifests, seals and evaluations that anybody may have written: an answer for each, never a traceback or a wait."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specs.base import fingerprint
from stages import artifact as store
from stages import checkpoint, evaluate
from stages.artifact import damage, publish, read
from stages.documents import read_json, read_object, read_sealed, write_json
from stages.errors import InvalidInput, StageFailed
from stages.evaluate import Evaluation
from stages.manifest import sealed
from stages.measure import ratio

FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.sampled_from(
    ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a\0b", "./a", "a//b", "manifest.json", "model/config.json",
     "\ud800"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | NAMES, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A published artifact whose base is elsewhere and which is an adapter on itself: every path a reader has."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text("{}")
    work = folder / "work"
    (work / "model").mkdir(parents=True)
    (work / "model/config.json").write_text("{}")
    inputs = {"kind": "base", "files": {"config.json": store.sha256(folder / "base/config.json")}}
    record = {
        "model_path": str(folder / "base"),
        "beneath": {"identity": fingerprint(inputs), "files": {"config.json": "0" * 64}},
    }
    return publish(work, folder / f"store/00-base-{fingerprint(inputs)[:8]}", identity=inputs, record=record).path


@pytest.fixture
def manifest(place):
    """The real manifest; put back afterwards."""
    whole = (place / "manifest.json").read_bytes()
    yield json.loads(whole)
    (place / "manifest.json").write_bytes(whole)


def write(file: Path, document) -> bool:
    """Whether there is such a file: some documents have no bytes."""
    try:
        file.write_text(json.dumps(document), encoding="utf-8")
    except (ValueError, RecursionError):
        return False
    return True


def looked_at(place: Path) -> None:
    """All that readers do with an artifact before they believe it."""
    found = read(place)
    if found is not None:
        assert all(isinstance(line, str) for line in damage(found))
        assert isinstance(found.number, int)
        assert all(len(identity) == 64 for identity in found.parents if found.adapter)
        try:
            assert isinstance(found.loadable, Path)
        except StageFailed as error:
            assert "trivium run" in str(error)  # noqa: PT017 - either answer will do
    store.find(place.parent, "0" * 64)
    store.newest_of_stage(place.parent, "base")


@FUZZ
@given(content=st.binary(max_size=400))
def test_any_bytes_as_a_manifest(place, manifest, content):
    (place / "manifest.json").write_bytes(content)
    looked_at(place)


@FUZZ
@given(document=VALUES)
def test_any_json_as_a_manifest(place, manifest, document):
    if write(place / "manifest.json", document):
        looked_at(place)


def paths(document, before=()):
    """Every place in a document."""
    yield before
    if isinstance(document, dict):
        for key, value in document.items():
            yield from paths(value, (*before, key))


@FUZZ
@given(data=st.data(), value=VALUES, resealed=st.booleans(), renamed=st.none() | NAMES)
def test_any_change_to_a_real_manifest_sealed_again_or_not(place, manifest, data, value, resealed, renamed):
    changed = json.loads(json.dumps(manifest))
    *before, last = data.draw(st.sampled_from([path for path in paths(changed) if path]))
    inner = changed
    for key in before:
        inner = inner[key]
    if renamed is None:
        inner[last] = value
    else:
        inner[renamed] = inner.pop(last)
    if resealed:
        try:
            changed = sealed(changed["inputs"], changed["record"], changed["files"])
        except (KeyError, ValueError, TypeError):
            return
    if write(place / "manifest.json", changed):
        looked_at(place)


HOSTILE = {
    "nested deeply": "[" * 200_000,
    "nested objects": '{"a":' * 100_000,
    "not a number": '{"format": NaN}',
    "infinite": '{"format": 1e999}',
    "a key twice": '{"format": 1, "format": 1}',
    "a number of a million digits": '{"format": ' + "9" * 1_000_000 + "}",
    "half a character": '{"format": "\\ud800"}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_is_no_manifest_no_seal_and_no_evaluation(place, manifest, tmp_path, text):
    for file in (place / "manifest.json", tmp_path / "checkpoint-1/seal.json", tmp_path / "evaluation.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert read(place) is None
    assert checkpoint.damage(tmp_path / "checkpoint-1") is not None
    assert evaluate.load(tmp_path / "evaluation.json") is None


OUTSIDE = ["../x", "/etc/hostname", "a/../../x", "..", ".", "", "a\0b", "./training.json", "a//b"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["files", "beneath"])
def test_a_name_that_leads_outside_is_in_no_manifest(place, manifest, name, where):
    if where == "files":
        manifest["files"][name] = {"sha256": "0" * 64, "size": 1}
    else:
        manifest["record"]["beneath"]["files"][name] = "0" * 64
    write(place / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    assert read(place) is None


@pytest.mark.parametrize("size", [-1, True, 1.5, "2", None, [2]])
def test_a_size_is_a_number_of_bytes(place, manifest, size):
    manifest["files"]["model/config.json"]["size"] = size
    write(place / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    assert read(place) is None


@pytest.mark.parametrize("model_path", ["relative", "/a\0b", 5, "../base", ""])
def test_a_base_is_elsewhere_by_a_full_path_or_not_at_all(place, manifest, model_path):
    manifest["record"]["model_path"] = model_path
    write(place / "manifest.json", sealed(manifest["inputs"], manifest["record"], manifest["files"]))
    assert read(place) is None


def test_adapters_that_lie_beneath_each_other_are_refused_and_end(place, manifest):
    del manifest["record"]["model_path"]
    shutil.move(place / "model", place.parent / "model")
    try:
        write(place / "manifest.json", sealed(manifest["inputs"], manifest["record"], {}))
        found = read(place)
        assert any("the base that it belongs on" in line for line in damage(found))
    finally:
        shutil.move(place.parent / "model", place / "model")


@pytest.mark.parametrize("reader", [read_json, read_object, read_sealed])
def test_a_file_above_the_limit_is_not_read_and_memory_stays_small(tmp_path, reader):
    file = tmp_path / "large.json"
    with file.open("wb") as handle:
        handle.truncate(1 << 40)  # a terabyte of nothing
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=r"large\.json: cannot be read as JSON: larger than 1 MiB"):
            reader(file, limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [16 << 20, 64 << 20, 256 << 20])
def test_every_reader_of_ours_has_a_limit(place, manifest, tmp_path, limit):
    """A terabyte each: were one read to its end, this test would not."""
    (tmp_path / "checkpoint-1").mkdir()
    for file in (place / "manifest.json", tmp_path / "checkpoint-1/seal.json", tmp_path / "evaluation.json"):
        with file.open("wb") as handle:
            handle.write(b" ")
            handle.truncate(1 << 40)
    if limit == 16 << 20:
        assert read(place) is None
    elif limit == 64 << 20:
        assert checkpoint.damage(tmp_path / "checkpoint-1") is not None
    else:
        assert evaluate.load(tmp_path / "evaluation.json") is None


def test_a_pipe_a_device_and_a_folder_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(InvalidInput, match="cannot be read as JSON: not a regular file"):
            read_json(file)


@FUZZ
@given(content=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_seal_of_a_checkpoint(tmp_path, content):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "seal.json").write_bytes(content)
    assert checkpoint.damage(folder) is not None


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_as_an_evaluation(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert evaluate.load(tmp_path / "x.json") is None


@FUZZ
@given(data=st.data(), value=VALUES)
def test_any_change_to_a_real_evaluation_gives_one_of_the_right_types_or_none(tmp_path, data, value):
    file = tmp_path / "x.json"
    measure = ratio([1.0, 2.0], [1.0, 1.0], "lower")
    evaluate.save(Evaluation({"x": measure}, "x", {"tokens": 3}, {"chosen": [1.0]}, 0.5), file, {"model": "a"})
    body = json.loads(file.read_text())["body"]
    *before, last = data.draw(st.sampled_from([path for path in paths(body) if path]))
    inner = body
    for key in before:
        inner = inner[key]
    inner[last] = value
    try:
        write_json(file, {"sha256": fingerprint(body), "body": body})
    except (ValueError, RecursionError):
        return
    found = evaluate.load(file)
    if found is not None:
        assert all(
            isinstance(one.value, float) and one.better in {"higher", "lower"} for one in found.measures.values()
        )
        assert isinstance(found.seconds, float)
