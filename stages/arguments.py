"""The one translation from a spec's `train` to the trainer library's arguments."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from stages.objective import ObjectiveSpec

_REFUSED = {
    "gradient_checkpointing": "use train.gradient_checkpointing",
    "save_total_limit": "use train.keep_checkpoints: the trainer deletes by the clock",
    "save_only_model": "a checkpoint without its optimizer resumes as another run, without a word",
    "ignore_data_skip": "a resumed run would see other rows",
    "auto_find_batch_size": "it shrinks the batch, and so changes the result, without a word; use micro_batch_size",
    "fp16": "use train.precision; float16 without loss scaling is not offered",
    "loss_weights": "a stage has one loss: train.loss",
    "load_best_model_at_end": "there is no evaluation inside a stage; gates judge its end",
    "eval_strategy": "there is no evaluation inside a stage; metrics are measured at its end",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "a trainer's checkpoints are not for publishing; publish the released model",
    ),
    "hub_token": "a spec holds no secrets; export HF_TOKEN",
    "enable_jit_checkpoint": "it may save in the middle of a step; a stage that is told to stop saves at a step's end",
    "resume_from_checkpoint": "a stage resumes from its own sealed checkpoints, without being asked",
    "chat_template_path": "use model.chat_template",
    "trust_remote_code": "code that comes with a model is never run",
    "model_init_kwargs": "the stage loads its own start model",
}
"""Arguments that would be ignored, or would break what a stage promises; each with what to do instead."""
_SETTINGS = ("deepspeed", "fsdp_config", "accelerator_config", "liger_kernel_config")
"""Arguments that hold settings or name a file of them."""

_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}


def trainer_arguments(stage: ObjectiveSpec, *, seed: int, folder: Path, bfloat16: bool, cpu: bool) -> dict[str, Any]:
    """Every argument of the trainer that a spec decides, by the trainer's own names.

    Args:
        stage: the stage as the spec has it.
        seed: the stage's seed or the pipeline's.
        folder: where resumable checkpoints go.
        bfloat16: whether the forward pass runs under bfloat16 autocast.
        cpu: whether there is no GPU.
    """
    train = stage.train
    return {
        "output_dir": str(folder),
        "learning_rate": train.learning_rate,
        "num_train_epochs": train.epochs if train.epochs is not None else 1,
        "max_steps": train.max_steps if train.max_steps is not None else -1,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.batch_size // train.micro_batch_size,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_ratio,
        "optim": _OPTIMIZERS[train.optimizer],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "bf16": bfloat16,
        "use_cpu": cpu,
        "activation_checkpointing": train.gradient_checkpointing,
        "seed": seed,
        "data_seed": seed,
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # on, it reports a finite loss for a model that is all nan
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not cpu,
        **stage.trainer_arguments(),
        **train.extra,
    }


@cache
def known_arguments(module: str, name: str) -> frozenset[str]:
    """The argument names of a trainer's configuration class, read from its source without importing it."""
    package = importlib.util.find_spec(module.partition(".")[0])
    if package is None or package.origin is None:
        return frozenset()
    file = Path(package.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    names: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = {alias.name: node for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        names |= {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        for parent in node.bases:
            names |= _inherited(module, parent, imports)
    return frozenset(names)


def _inherited(module: str, parent: ast.expr, imports: dict[str, ast.ImportFrom]) -> frozenset[str]:
    if not isinstance(parent, ast.Name):
        return frozenset()
    if parent.id == "TrainingArguments":
        return known_arguments("transformers.training_args", parent.id)
    source = imports.get(parent.id)
    if source is None:
        return frozenset()
    home = module.rsplit(".", source.level)[0] if source.level else ""
    return known_arguments(f"{home}.{source.module}".strip("."), parent.id)


def extra_problems(stage: ObjectiveSpec) -> list[tuple[str, str]]:
    """What is wrong with `train.extra`: the key, and a message."""
    if not stage.train.extra:
        return []  # reading the library's source takes longer than the rest of a plan
    known = known_arguments(*stage.trainer_config)
    ours = set(
        trainer_arguments(
            stage.model_copy(update={"train": stage.train.model_copy(update={"extra": {}})}),
            seed=0,
            folder=Path(),
            bfloat16=False,
            cpu=True,
        )
    )
    problems = []
    for key, value in stage.train.extra.items():
        if key in ours:
            problems.append((key, f"{key!r} is decided by the fields of train; remove it here"))
        elif key in _REFUSED:
            problems.append((key, f"{key!r} is not taken: {_REFUSED[key]}"))
        elif key in _SETTINGS and isinstance(value, str):
            reason = "a file's content would be no part of the stage's identity; write the settings out as a mapping"
            problems.append((key, f"{key!r} names a file: {reason}"))
        elif key not in known:
            from difflib import get_close_matches

            near = get_close_matches(key, known, 3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            problems.append((key, f"the trainer ({stage.trainer_config[1]}) has no argument {key!r}{hint}"))
    return problems
