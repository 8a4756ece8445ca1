"""Whether the files of a base are what their names say, as far as that is quick to know and without torch."""

from pathlib import Path

from stages.documents import LFS_POINTER, read_object
from stages.errors import InvalidInput

_GGUF = b"GGUF"
_GGUF_VERSIONS = (2, 3)
"""Those that the gguf package reads."""
_GGUF_HEADER = 24
"""Bytes: magic, version (4 each), number of tensors, number of settings (8 each)."""
_LARGEST_TOKENIZER = 256 << 20
"""Bytes of the largest tokenizer.json; those of large vocabularies have some 40 MB."""


def gguf_problem(file: Path) -> str | None:
    """Why a file cannot be a GGUF with a model in it, by its first bytes; None where it may be one.

    Raises:
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        head = stream.read(_GGUF_HEADER)
    if head.startswith(LFS_POINTER):
        return f"{file}: a Git LFS pointer, not the model; fetch what it stands for with git lfs pull"
    if head[:4] != _GGUF:
        begins = f"it begins with {head[:4]!r}" if head else "it is empty"
        return f"{file}: not a GGUF file: {begins}, not with {_GGUF!r}; fetch it again, or name a folder by model.path"
    if len(head) < _GGUF_HEADER:
        return f"{file}: a GGUF file that was cut off after {len(head)} bytes; fetch it again"
    version, tensors = int.from_bytes(head[4:8], "little"), int.from_bytes(head[8:16], "little")
    if version not in _GGUF_VERSIONS:
        known = " and ".join(map(str, _GGUF_VERSIONS))
        return f"{file}: GGUF of version {version}, and {known} can be read (little-endian ones); convert it anew"
    if tensors == 0:
        return f"{file}: a GGUF file without any weights (a vocabulary by itself?); name the model's own file"
    return None


def tokenizer_problem(folder: Path) -> str | None:
    """Why the ``tokenizer.json`` of a checkpoint is none; None where it is one, or where there is no such file.

    Raises:
        OSError: the file cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            return f"{file}: a Git LFS pointer; fetch what it stands for with git lfs pull"
    if file.stat().st_size > _LARGEST_TOKENIZER:
        return f"{file}: larger than {_LARGEST_TOKENIZER >> 20} MiB, so hardly a tokenizer; fetch it again"
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        said = " ".join(str(error).split())
        try:
            read_object(file, limit=_LARGEST_TOKENIZER)
        except InvalidInput as problem:  # it says where the text stops being JSON
            return f"{problem}; fetch it again"
        return f"{file}: JSON, but no tokenizer that can be loaded ({said[:300]}); fetch it again"
    return None
