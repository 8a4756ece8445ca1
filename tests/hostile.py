"""What an attacker would bring: pickles that touch a file, models with code, tasks that import it."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import tiny

CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def write_pickle(file: Path, mark: Path) -> Path:
    """A plain pickle, as `torch.load` reads old files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps({"weight": Touch(mark)}, protocol=2))
    return file


def write_torch(file: Path, mark: Path) -> Path:
    """A pickle in the archive that `torch.save` writes today."""
    import torch

    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": Touch(mark)}, file)
    return file


def in_archive(file: Path, mark: Path, good: Path) -> Path:
    """A sound file of the trainer library with its pickle exchanged."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(file.with_suffix(".new"), "w") as target:
        for one in source.namelist():
            data = pickle.dumps(Touch(mark), protocol=2) if one.endswith("data.pkl") else source.read(one)
            target.writestr(one, data)
    shutil.move(file.with_suffix(".new"), file)
    return file


def edit_json(file: Path, **settings: Any) -> None:
    """Change settings of a JSON file."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | settings))


def write_own_model(folder: Path, mark: Path) -> Path:
    """A tiny model whose class comes with it; running its code touches ``mark``."""
    tiny.write_model(folder)
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)))
    edit_json(folder / "config.json", model_type="own-llama", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    return folder
