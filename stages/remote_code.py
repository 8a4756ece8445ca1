"""Python code that comes with a model: never run, unless the spec names the very hash of it.

A folder asks for its code by `auto_map` in its config or its tokenizer's settings. Where transformers has classes of
its own for the model, they serve it and the code is left alone.
"""

import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from stages.documents import read_json
from stages.errors import InvalidInput

FIELD = "model.allow_remote_code"
_MAP = "auto_map"
_ELSEWHERE = "--"
"""Parts the id of another repository from a class in it."""

_allowed: str | None = None


@contextmanager
def allowing(digest: str | None) -> Iterator[None]:
    """Let the code with this digest run in this process, and no other."""
    global _allowed  # noqa: PLW0603 - a process does one job
    before, _allowed = _allowed, digest
    try:
        yield
    finally:
        _allowed = before


def record() -> dict[str, str]:
    """For the manifest of what is made: the digest of the code that was allowed to run."""
    return {} if _allowed is None else {"remote_code": _allowed}


def code_files(model: Path) -> list[Path]:
    """The Python files of a model's folder, at any depth, sorted."""
    return sorted(path for path in model.rglob("*.py") if path.is_file())


def code_digest(model: Path) -> str:
    """The sha256 (hex) over the names and the content of a folder's Python files."""
    total = hashlib.sha256()
    for path in code_files(model):
        content = path.read_bytes()
        total.update(f"{path.relative_to(model).as_posix()}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()


def trusted(model: Path) -> bool:
    """Whether transformers may run the code that comes with ``model``; what is passed as `trust_remote_code`.

    Raises:
        InvalidInput: the model cannot be loaded without code that nobody allowed.
    """
    asks = _asks(model)
    if not asks:
        return False
    if _allowed is None and _served_by_transformers(model):
        return False
    for file, names in asks:
        if any(_ELSEWHERE in name for name in names):
            raise InvalidInput(
                f"{file}: asks for code of another repository ({', '.join(names)}), which no digest of this folder "
                "covers; put its Python files into the folder and name the classes without the repository"
            )
    if not code_files(model):
        file, names = asks[0]
        raise InvalidInput(
            f"{file}: the model needs Python code ({', '.join(names)}), and transformers has no classes of its own for "
            "it; the folder holds no Python files: fetch the model again with them, read them, and run this again"
        )
    if _allowed is None:
        raise InvalidInput(_refusal(model, *asks[0]))
    if (found := code_digest(model)) != _allowed:
        raise InvalidInput(
            f"{model}: its Python files have the sha256 {found}, and the spec allows {_allowed} ({FIELD}); they were "
            "changed, or are others than were read: read them again, and then name the new one"
        )
    return True


def _refusal(model: Path, file: Path, names: list[str]) -> str:
    """Why a model with code is refused, and how to allow it."""
    return (
        f"{file}: the model brings Python code ({', '.join(names)}) that would run on this machine as you, and "
        f"transformers has no classes of its own for it; read the *.py files in {model}, and if you trust them set "
        f"{FIELD}: {code_digest(model)}"
    )


def copy_code(source: Path, target: Path) -> None:
    """Put the code that ``source`` needs beside a model that was written to ``target``, if it needs any."""
    if not trusted(source):
        return
    for path in code_files(target):  # the library copies some of them, by a rule of its own
        path.unlink()
    for path in code_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def _asks(model: Path) -> list[tuple[Path, list[str]]]:
    """The files of a checkpoint that name code to load, each with the names."""
    found = []
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        named = _settings(model / name).get(_MAP)
        if named:
            found.append((model / name, sorted(_strings(named))))
    return found


def _strings(named: Any) -> set[str]:
    """All the classes that an `auto_map` names: a text, or a list of them, for each automatic class."""
    if isinstance(named, str):
        return {named}
    inner = named.values() if isinstance(named, dict) else named if isinstance(named, list) else ()
    return {name for one in inner for name in _strings(one)}


def _settings(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.is_file() else None
    return found if isinstance(found, dict) else {}


def _served_by_transformers(model: Path) -> bool:
    return _settings(model / "config.json").get("model_type") in _own_model_types()


@cache
def _own_model_types() -> frozenset[str]:
    """The model types for which transformers has a causal language model, read from its source: no import."""
    package = importlib.util.find_spec("transformers")
    places = package.submodule_search_locations if package is not None else None
    if not places:
        return frozenset()
    text = (Path(places[0]) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
    table = text.partition("\nMODEL_FOR_CAUSAL_LM_MAPPING_NAMES = ")[2].partition("\n)\n")[0]
    return frozenset(re.findall(r'\("([^"]+)", ', table))
