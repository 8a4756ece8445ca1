"""Pickles: files that can run code when they are opened. Weights in them are refused by name, unopened.

The one place where they are read is a checkpoint of ours on resume: the trainer library keeps its optimizer there.
What such a file would load is listed first, without loading it.
"""

from pathlib import Path

from stages.documents import read_json
from stages.errors import InvalidInput, StageFailed
from stages.layout import INDEX

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Endings of files that are, or may be, pickles."""
TRAINER_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt")
"""Pickles that the trainer library reads on resume, besides its `rng_state*.pth`."""
NEVER_READ = ("training_args.bin",)
"""A pickle that the trainer library writes into each checkpoint, and nobody reads."""


def refuse_pickled_weights(model: Path) -> None:
    """Refuse a folder whose weights are in pickles. Those beside safetensors are left alone: nothing opens them.

    Raises:
        InvalidInput: with the file and how to convert it.
    """
    if list(model.glob("*.safetensors")):
        _check_index(model / INDEX)
        return
    found = sorted(file for file in model.glob("*") if file.suffix in PICKLES)
    if found:
        raise InvalidInput(f"{found[0]}: {a_pickle(model)}")


def a_pickle(model: Path) -> str:
    """What is wrong with weights in a pickle, and what to do."""
    return (
        "weights in a pickle, which can run code when it is opened, so it was not; convert it on a machine and in an "
        f"account where that may happen: AutoModelForCausalLM.from_pretrained({str(model)!r})"
        ".save_pretrained(FOLDER, safe_serialization=True)"
    )


def refuse_foreign_objects(checkpoint: Path) -> None:
    """Refuse to resume from a checkpoint whose files would load anything but tensors and numbers.

    Raises:
        StageFailed: with the file, what it would load and what to do.
    """
    for file in sorted(path for path in checkpoint.rglob("*") if path.suffix in PICKLES):
        ours = file.name in TRAINER_STATE or (file.name.startswith("rng_state") and file.suffix == ".pth")
        reason = _foreign(file) if ours else "no file that a trainer of ours writes"
        if reason is not None and file.name not in NEVER_READ:
            raise StageFailed(
                f"{file}: {reason}; nothing of it was run. Somebody changed this checkpoint: delete {checkpoint} and "
                "run again, and the stage goes on from the checkpoint before it"
            )


def _foreign(file: Path) -> str | None:
    from torch.serialization import get_unsafe_globals_in_checkpoint
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            found = sorted(get_unsafe_globals_in_checkpoint(str(file)))
    except Exception as error:  # a file that was made to be malformed raises whatever it likes
        return f"not a file of tensors ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return f"would load {', '.join(found[:3])}" if found else None


def _check_index(index: Path) -> None:
    """The names of the shards are opened as they stand: none may lead elsewhere, or be a pickle."""
    if not index.is_file():
        return
    document = read_json(index)
    named = document.get("weight_map") if isinstance(document, dict) else None
    for name in sorted(set(map(str, named.values()))) if isinstance(named, dict) else ():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidInput(
                f"{index}: names {name!r:.200} as a file of weights; allowed are *.safetensors beside it: save the "
                "model again with save_pretrained(safe_serialization=True)"
            )
