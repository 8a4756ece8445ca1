"""Secrets of the environment: in no log, manifest, checkpoint or report, nor in Prefect's database."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from stages import log

SECRETS = {
    "HF_TOKEN": "hf_" + "CanaryCanaryCanary0123456789",
    "OPENAI_API_KEY": "sk-" + "canary-0123456789abcdefghij",
    "MY_SECRET": "a canary, quite as secret",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYCANARYKEY",
}
URL = "postgres://somebody:canarypassword@db.example.org/prefect"
PLANTED = [*SECRETS.values(), "canarypassword"]

# Put on the path of every process of a run: a library that prints what it was given, and one that fails with it.
LEAK = f"""\
import logging, os, sys, warnings

def leak(event, arguments):
    if event != "open" or "stages.run" not in sys.orig_argv:
        return
    path = str(arguments[0])
    if not path.endswith(("corpus.jsonl", "output/model/config.json")):
        return
    text = " ".join(os.environ[name] for name in {sorted(SECRETS)!r}) + " {URL}"
    print(text)
    print(text, file=sys.stderr)
    logging.getLogger("some.library").error("refused: %s", text)
    warnings.warn(text)
    if path.endswith("config.json") and os.path.exists(os.environ["LEAK_FAILS"]):
        raise RuntimeError(f"401 for {{text}}")

sys.addaudithook(leak)
"""


@pytest.fixture
def project(tmp_path) -> Path:
    text = tiny.SPEC[: tiny.SPEC.index("  - name: answers")].replace(
        "max_steps: 12", "max_steps: 4, checkpoint_every: 2"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(LEAK)
    (tmp_path / "fail").touch()
    return tiny.write_project(tmp_path / "p", text)


def run(spec: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One run, with secrets in its environment and a leak in its stages."""
    home = spec.parents[1] / "home"
    home.mkdir(exist_ok=True)
    own = {"HOME": str(home), "PYTHONPATH": str(spec.parents[1] / "site"), "LEAK_FAILS": str(spec.parents[1] / "fail")}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(spec), *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | SECRETS | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def planted_in(folder: Path) -> list[str]:
    """Every file that holds a secret, as it is or as JSON would write it."""
    wanted = [form.encode() for value in PLANTED for form in {value, json.dumps(value)[1:-1]}]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [f"{path}: {value!r}" for path in files for value in wanted if value in path.read_bytes()]


def check(spec: Path, done: subprocess.CompletedProcess[str]) -> None:
    said = done.stdout + done.stderr
    assert not [value for value in PLANTED if value in said]
    assert planted_in(spec.parent) == []


@pytest.mark.model
def test_a_run_leaves_no_secret_behind_whether_it_fails_or_not(project):
    failed = run(project, "--no-prefect")
    assert failed.returncode == 4, failed.stderr
    assert re.search(r"401 for .*\[redacted\]", failed.stderr)
    check(project, failed)
    assert list(project.parent.glob("artifacts/tiny/.work/*/checkpoints/checkpoint-2/*.safetensors"))
    [text] = [path.read_text() for path in project.parent.glob("artifacts/tiny/.jobs/*knowledge*.log")]
    assert text.count("[redacted]") >= 5 * 4, "the leak was heard, and every part of it was taken out"
    assert "Traceback" in text

    (project.parents[1] / "fail").unlink()
    finished = run(project, "--no-prefect")
    assert finished.returncode in (0, 3), finished.stderr
    check(project, finished)


@pytest.mark.flow
def test_prefect_keeps_none_either(project):
    failed = run(project)
    assert failed.returncode == 4, failed.stderr
    check(project, failed)
    database = project.parent / "artifacts/.prefect/prefect.db"
    kept = database.read_bytes() + b"".join(path.read_bytes() for path in database.parent.glob("prefect.db-*"))
    assert b"401 for" in kept, "the reason is shown"
    assert b"[redacted]" in kept
    assert {path.name for path in (project.parents[1] / "home").iterdir()} <= {".cache", ".config"}


# The pieces


@pytest.fixture
def canary(monkeypatch) -> str:
    monkeypatch.setenv("MY_TOKEN", "a-canary-of-some-length")
    return "a-canary-of-some-length"


def test_a_secret_that_is_written_in_parts_is_taken_out(canary):
    beneath = io.StringIO()
    stream = log._Redacted(beneath)
    stream.write(f"before {canary[:7]}")
    stream.write(f"{canary[7:]} after\nand ")
    assert beneath.getvalue() == "before [redacted] after\n"
    stream.flush()
    assert beneath.getvalue().endswith("and ")


def test_empty_lines_stay(canary):
    beneath = io.StringIO()
    print("one", "", "two", sep="\n", file=log._Redacted(beneath))
    print(file=log._Redacted(beneath))
    assert beneath.getvalue() == "one\n\ntwo\n\n"


def test_events_hold_no_secret_at_any_depth(canary, monkeypatch):
    beneath = io.StringIO()
    monkeypatch.setattr(log, "_channel", beneath)
    log.event("failed", reason=f"for {canary}", rows=[{"text": canary}], number=3)
    told = json.loads(beneath.getvalue())
    assert told["rows"] == [{"text": "[redacted]"}]
    assert canary not in beneath.getvalue()
    assert told["number"] == 3


def test_log_records_hold_no_secret_in_message_arguments_or_traceback(canary, caplog):
    plain = logging.getLogRecordFactory()
    try:
        log.redact_logging()
        log.redact_logging()
        try:
            raise ValueError(canary)
        except ValueError:
            logging.getLogger("somebody").exception("failed with %s", canary)
        [record] = caplog.records
        assert record.getMessage() == "failed with [redacted]"
        assert canary not in logging.Formatter().format(record)
        assert "ValueError: [redacted]" in logging.Formatter().format(record)
    finally:
        logging.setLogRecordFactory(plain)


def test_a_state_shown_by_prefect_holds_no_secret(canary):
    code = (
        "from flows.pipeline import _failed; from stages.errors import StageFailed; import os;"
        "print(_failed(StageFailed('told ' + os.environ['MY_TOKEN'])).message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "told [redacted]"
