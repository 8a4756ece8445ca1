"""The tasks that come with the LM evaluation harness, read from its files without importing it.

The harness's own index parses 14,000 YAML files, which takes half a minute on a busy machine; what is asked of them
here stands on single lines.
"""

import difflib
import glob
import importlib.util
import os
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from stages.errors import InvalidInput

_PACKAGE = "lm_eval"
_LINE = re.compile(
    rb"""^["']?(task|group|tag|class|include|dataset_path|dataset_name|unsafe_code)["']?[ ]*:"""
    rb"""[ ]*([^\n#]*?)[ ]*(?:[ ]#[^\n]*)?\r?$((?:\n[ ]*-[ ]+[^\n]+)*)""",
    re.MULTILINE,
)
_TRUE = ("1", "true", "yes", "on")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_READERS = ("json", "csv", "parquet", "text", "arrow", "pandas", "webdataset", "imagefolder", "audiofolder")
"""What `dataset_path` may name that is no dataset."""
_NEAREST = 5
_DEEPEST = 9
"""Files that include one another, at most."""


class Installed(NamedTuple):
    """A name that the harness knows."""

    kind: Literal["task", "group", "tag"]
    file: str | None
    """Where it is defined; a tag is defined by the tasks that carry it."""
    dataset: tuple[str, str] | None = None
    """The dataset on the hub that it reads and the part of it, which may be empty, where its file says so."""
    runs_answers: bool = False
    """Whether it runs what the model writes."""
    members: tuple[str, ...] = ()
    """The names that a group lists, or the tasks that carry a tag."""


def folder() -> Path:
    """Where the harness keeps its tasks.

    Raises:
        InvalidInput: the harness is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InvalidInput(f"the LM evaluation harness is not installed: pip install {_PACKAGE}")
    return Path(found.submodule_search_locations[0]) / "tasks"


@cache
def installed() -> dict[str, Installed]:
    """Every task, group and tag by its name, as the harness's own index has them (the first file of a name counts)."""
    known: dict[str, Installed] = {}
    tags: dict[str, list[str]] = {}
    for file in _yaml_files(folder()):
        keys = _keys(file)
        is_group = "group" in keys and "class" not in keys
        name = keys["group"] if is_group else keys.get("task")
        if not name or "\n" in name or name in known:
            continue
        if is_group:
            members = [one.removeprefix("task:").strip() for one in keys.get("task", "").split("\n")]
            known[name] = Installed("group", file, members=tuple(members))
            continue
        dataset = keys.get("dataset_path")
        read = None if not dataset or dataset in _READERS else (dataset, keys.get("dataset_name", ""))
        known[name] = Installed("task", file, read, keys.get("unsafe_code", "").lower() in _TRUE)
        for tag in filter(None, keys.get("tag", "").split("\n")):
            tags.setdefault(tag, []).append(name)
    return {tag: Installed("tag", None, members=tuple(names)) for tag, names in tags.items()} | known


def problem(name: str) -> str | None:
    """Why the harness cannot measure a task of this name here, with what it has instead; None where it can."""
    tasks = installed()
    version = metadata.version(_PACKAGE)
    if name not in tasks:
        near = difflib.get_close_matches(name, tasks, _NEAREST) or [one for one in tasks if name in one][:_NEAREST]
        hint = f"the nearest are {', '.join(near)}" if near else "no name is near"
        return (
            f"no task {name!r} is installed in the harness ({_PACKAGE} {version}): {hint}; `lm_eval ls tasks` lists "
            "all, and a task of your own is named by its file, NAME.yaml"
        )
    if tasks[name].kind == "tag":
        carried = tasks[name].members
        return (
            f"{name!r} is a tag of {len(carried)} tasks and has no value of its own; name one of them: "
            f"{', '.join(carried[:_NEAREST])}{', …' if len(carried) > _NEAREST else ''}"
        )
    if tasks[name].runs_answers:
        return f"task {name!r} runs what the model writes as a program, which is not done here; take another task"
    return None


def not_here(name: str) -> list[str]:
    """The datasets that an installed task, or the tasks of a group, have to fetch before they can be measured."""
    tasks, found, seen = installed(), dict[str, None](), set[str]()
    left = [name]
    while left:
        task = tasks.get(one := left.pop())
        if task is None or one in seen:
            continue
        seen.add(one)
        left += task.members
        if task.dataset is not None and not _is_cached(*task.dataset):
            found[task.dataset[0]] = None
    return list(found)


def is_offline() -> bool:
    """Whether the environment tells the hub's libraries to stay off the network."""
    return any(os.environ.get(name, "").lower() in _TRUE for name in _OFFLINE)


def _is_cached(dataset: str, part: str) -> bool:
    """Whether the datasets library has prepared this dataset before; without the network it takes it from there."""
    *owner, name = dataset.split("/")
    snake = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser() / "___".join([*owner, snake])
    return any(place.is_dir() for place in kept.glob(f"{glob.escape(part)}*/*/*"))


def _yaml_files(root: Path) -> list[str]:
    # Not as Paths: with 14,000 of them that would double the time.
    return sorted(
        os.path.join(place, name)  # noqa: PTH118
        for place, _, names in os.walk(root)
        for name in names
        if name.endswith(".yaml")
    )


@cache
def _keys(file: str, depth: int = 0) -> dict[str, str]:
    """The keys of a task file that are asked for, those of what it includes beneath; lists joined by line ends."""
    try:
        with open(file, "rb") as stream:  # noqa: PTH123
            own = {key.decode(): _values(value, items) for key, value, items in _LINE.findall(stream.read())}
    except OSError:
        return {}
    if (included := own.pop("include", "")) and depth < _DEEPEST:
        return _keys(os.path.join(os.path.dirname(file), included), depth + 1) | own  # noqa: PTH118, PTH120
    return own


def _values(value: bytes, items: bytes) -> str:
    text = value.decode(errors="replace")
    if not items and not text.startswith("["):
        return text.strip("'\"")
    listed = [*text.strip("[]").split(","), *(line.strip()[1:] for line in items.decode(errors="replace").splitlines())]
    return "\n".join(filter(None, (one.strip().strip("'\"") for one in listed)))
