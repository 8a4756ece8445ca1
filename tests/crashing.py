"""Processes that are killed: fork after the imports, let the child come to a place, kill it there without warning."""

import gc
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy
import peft.peft_model
import pytest
import torch
from one_stage import only_job
from safetensors import safe_open
from transformers import modeling_utils

from stages import train
from stages.artifact import damage, read
from stages.job import STAGE, Job
from stages.run import import_ahead

import_ahead(STAGE)
gc.collect()
gc.freeze()  # a stage collects several times; half of its seconds went into looking at modules, and forks copy less

PATIENCE = 120
"""Seconds until a child that never comes to its place is given up."""

Here = Callable[[], NoReturn]
Arrange = Callable[[Here], None]


def killed(arrange: Arrange, work: Callable[[], object]) -> None:
    """Do ``work`` in a child and kill it with SIGKILL at the place that ``arrange`` chooses.

    Args:
        arrange: called in the child before the work; makes something call what it is given, which never returns.
        work: what the child does.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:

            def here() -> NoReturn:
                os.write(theirs, b"here")
                while True:
                    signal.pause()

            # A fork has none of its parent's threads, and loading in several would ask torch for them.
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
            arrange(here)
            work()
        except BaseException:
            traceback.print_exc()  # the parent only sees that the pipe was closed
        finally:
            os._exit(1)
    os.close(theirs)
    try:
        ready, _, _ = select.select([ours], [], [], PATIENCE)
        said = os.read(ours, 4) if ready else b"nothing in time"
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert said == b"here", "the child ended before it came to the place; its traceback is above"
    assert os.WTERMSIG(status) == signal.SIGKILL


Matches = Callable[..., bool]


def before(owner: Any, name: str, number: int = 1, *, where: Matches = lambda *_, **__: True) -> Arrange:
    """Stop at the ``number``-th call of a function, before it does anything; ``where`` says which calls count."""
    return _at(owner, name, number, where, after=False)


def after(owner: Any, name: str, number: int = 1, *, where: Matches = lambda *_, **__: True) -> Arrange:
    """Stop when the ``number``-th call of a function has done its work; ``where`` says which calls count."""
    return _at(owner, name, number, where, after=True)


def _at(owner: Any, name: str, number: int, where: Matches, *, after: bool) -> Arrange:
    def arrange(here: Here) -> None:
        real, calls = getattr(owner, name), []

        def stop(*arguments: Any, **named: Any) -> Any:
            counts = where(*arguments, **named)
            calls.extend([name] * counts)
            if counts and len(calls) == number and not after:
                here()
            result = real(*arguments, **named)
            if counts and len(calls) == number:
                here()
            return result

        setattr(owner, name, stop)

    return arrange


_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def photograph(root: Path, album: Path) -> None:
    """From now on, copy ``root`` before every change of a file in it: what SIGKILL would leave at that moment.

    Python reports its own calls. What the libraries write by themselves is reported around them: see below.
    """
    busy: list[bool] = []

    def take() -> None:
        busy.append(True)
        shutil.copytree(root, album / f"{len(list(album.iterdir())):04d}", symlinks=True)
        busy.clear()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if busy or not (event in _WRITES or event == "open"):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(str(root)):
            take()

    def around(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            take()
            found = real(*arguments, **named)
            take()
            return found

        setattr(owner, name, wrapped)

    album.mkdir()
    around(torch, "save")
    around(modeling_utils, "safe_save_file")
    around(peft.peft_model, "safe_save_file")
    sys.addaudithook(watch)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something when a training step is reported."""
    tell = train.event

    def listen(kind: str, **fields: Any) -> None:
        if kind == "progress" and fields["step"] == step and "loss" in fields:
            act()
        tell(kind, **fields)

    monkeypatch.setattr(train, "event", listen)


def disturb() -> None:
    """A new process would not find the random generators where this one left them."""
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(987)


def stage_job(folder: Path, root: Path, stage: str, rest: str = "", *, dtype: str = "float32") -> Job:
    """The job of a pipeline's only stage, its base published.

    Args:
        folder: holds ``base/`` and what the stage reads.
        root: where artifacts go.
        stage: the stage in YAML, without its name.
        rest: top-level keys of the spec in YAML.
        dtype: of the release, and of measurements.
    """
    indented = "\n".join(f"    {line}" for line in stage.strip().splitlines())
    root.mkdir(parents=True, exist_ok=True)
    spec = root / "spec.yaml"
    spec.write_text(
        f"name: it\nmodel: {{path: base, dtype: {dtype}}}\nseed: 5\n{rest}stages:\n  - name: only\n{indented}\n"
    )
    return only_job(spec, root, folder)


class Result(NamedTuple):
    """What a published stage came to."""

    weights: str
    """sha256 over all tensors: the model's, the adapter's, and the logits on the probe."""
    curve: list[dict[str, Any]]
    record: dict[str, Any]


def result(job: Job) -> Result:
    """What a job published; every byte is as its manifest says."""
    artifact = read(Path(job.target))
    assert artifact is not None
    assert damage(artifact) == []
    digest = hashlib.sha256()
    for path in sorted(artifact.path.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{path.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    curve = json.loads((artifact.path / "training.json").read_text())["training"]["curve"]
    return Result(digest.hexdigest(), curve, artifact.manifest["record"]["training"])


def checkpoints(job: Job) -> Path:
    """Where a job's checkpoints are."""
    return Path(job.work) / "checkpoints"


def published(job: Job) -> bool:
    """Whether a job's artifact is there."""
    return Path(job.target).exists()
