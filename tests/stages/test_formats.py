"""Files of a base that are not what their names say: told by `validate`, at their place, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from headers import GGUF_HEADER as HEADER
from headers import llama, write_headers

from specs.load import SpecError
from stages.check import read_spec
from stages.formats import gguf_problem, tokenizer_problem

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 130\n"
SPEC = """\
name: tiny
model: {base}
stages:
  - name: a
    kind: cpt
    method: {{kind: full}}
    data: [{{path: data/corpus.jsonl}}]
    train: {{learning_rate: 1e-4, max_steps: 1}}
"""
TOKENIZER = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def problems(folder: Path, base: str) -> list[str]:
    tiny.write_data(folder)
    (folder / "spec.yaml").write_text(SPEC.format(base=base))
    try:
        read_spec(folder / "spec.yaml")
    except SpecError as error:
        return [str(problem) for problem in error.problems]
    return []


JUNK = {
    "empty": (b"", "not a GGUF file: it is empty"),
    "a web page": (b"<!DOCTYPE html><html>...", "not a GGUF file: it begins with b'<!DO'"),
    "a pointer": (POINTER, "a Git LFS pointer, not the model; fetch what it stands for with git lfs pull"),
    "cut off": (HEADER[:11], "a GGUF file that was cut off after 11 bytes; fetch it again"),
    "version 1": (HEADER[:4] + b"\1\0\0\0" + HEADER[8:], "GGUF of version 1, and 2 and 3 can be read"),
    "big-endian": (HEADER[:4] + b"\0\0\0\3" + HEADER[8:], "GGUF of version 50331648, and 2 and 3 can be read"),
    "no weights": (HEADER[:8] + bytes(8) + HEADER[16:], "a GGUF file without any weights"),
}


@pytest.mark.parametrize(("content", "said"), JUNK.values(), ids=JUNK)
def test_a_gguf_that_is_none_is_refused_by_validate_at_its_place(tmp_path, content, said):
    (tmp_path / "m.gguf").write_bytes(content)
    [found] = problems(tmp_path, "{gguf: m.gguf}")
    assert found.startswith(f"{tmp_path / 'spec.yaml'}:2:")
    assert f"model.gguf: {tmp_path / 'm.gguf'}: {said}" in found


def test_the_head_of_a_gguf_is_enough_to_pass(tmp_path):
    (tmp_path / "m.gguf").write_bytes(HEADER)
    assert gguf_problem(tmp_path / "m.gguf") is None
    assert problems(tmp_path, "{gguf: m.gguf}") == []


BROKEN = {
    "a pointer": (POINTER, "a Git LFS pointer"),
    "torn": (json.dumps(TOKENIZER).encode()[:-9], "cannot be read as JSON"),
    "other JSON": (b'{"a": 1}', "JSON, but no tokenizer that can be loaded"),
    "no UTF-8": (b'{"a": "\xff"}', "cannot be read as JSON"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_tokenizer_is_refused_by_validate_at_its_place(tmp_path, content, said):
    write_headers(tmp_path / "base", llama())
    (tmp_path / "base/tokenizer.json").write_bytes(content)
    [found] = problems(tmp_path, "{path: base}")
    assert f"model.path: {tmp_path / 'base/tokenizer.json'}: {said}" in found


def test_a_tokenizer_that_loads_is_looked_at_without_torch(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    script = (
        "import sys; from pathlib import Path; from stages.formats import tokenizer_problem; "
        f"assert tokenizer_problem(Path({str(tmp_path)!r})) is None; "
        "assert 'tokenizers' in sys.modules; assert 'torch' not in sys.modules; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert tokenizer_problem(tmp_path / "elsewhere") is None
