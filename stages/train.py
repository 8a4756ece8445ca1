"""The trainer library's loop, and what must hold before, during and after it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import checkpoint, conditions, probe
from stages.arguments import trainer_arguments
from stages.documents import make_folder
from stages.errors import StageFailed, TryAgain
from stages.finite import stop_before_bad_steps
from stages.log import event, info
from stages.methods.base import Prepared
from stages.objective import ObjectiveSpec
from stages.pickles import refuse_foreign_objects
from stages.preemption import Preemption

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CURVE = ("step", "loss", "learning_rate", "grad_norm", "rewards/accuracies", "rewards/margins")
"""What is kept of each logged step."""
_ROUTER = ("output_router_logits", "router_aux_loss_coef")
FIRST_LOSS_TOLERANCE = 0.02
"""How far DPO's first loss may be from its value for equal models: autocast rounds log-probabilities."""


class _Finished(Exception):
    """All steps had been taken when the run before ended; transformers 5.23 would take one more, within an epoch."""


def computes_in_bfloat16() -> bool:
    """Whether this device multiplies in bfloat16 itself; elsewhere autocast would only cost time."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocasts(stage: ObjectiveSpec) -> bool:
    """Whether a stage's forward pass runs under bfloat16 autocast on this machine."""
    if stage.train.precision != "auto" or stage.train.weights_dtype == "bfloat16":
        return stage.train.precision != "float32"
    return computes_in_bfloat16()


def score_only_learned_positions() -> None:
    """Let TRL's LM head see only the positions that are learned, on every device.

    Where Triton runs, TRL 1.16 drops masked and padded positions before it multiplies by the vocabulary;
    elsewhere it multiplies all of them, most of an IFT or DPO batch, and throws the result away. Its reason is
    recompilation on one kind of accelerator, which a CPU does not know. A test holds the losses equal.
    """
    from trl.trainer import utils

    utils._use_triton = lambda _device: True


def fit(
    stage: ObjectiveSpec,
    prepared: Prepared,
    tokenizer: "PreTrainedTokenizerBase",
    dataset: "Dataset",
    *,
    seed: int,
    folder: Path,
    preemption: Preemption | None,
) -> dict[str, Any]:
    """Train to the end, resuming from the newest whole checkpoint in ``folder``.

    Returns:
        The record of the run: steps, tokens, the loss curve, precision.

    Raises:
        StageFailed: a non-finite loss, or an invariant that does not hold.
        TryAgain: SIGTERM came; a sealed checkpoint was left behind.
    """
    import torch
    from transformers import set_seed

    cpu = not torch.cuda.is_available()
    bfloat16 = autocasts(stage)
    arguments = trainer_arguments(stage, seed=seed, folder=folder, bfloat16=bfloat16, cpu=cpu)
    watcher = _watcher(stage, folder, preemption)
    score_only_learned_positions()
    ids = probe.probe_ids(prepared.model)
    mixed = stage.train.weights_dtype == "bfloat16"
    before = probe.logits(prepared.model, ids, autocast=mixed)
    router = _router_settings(prepared.model)
    make_folder(folder)  # before the trainer does, which does not flush its name
    trainer = stage.trainer(prepared.model, tokenizer, dataset, arguments, [watcher])
    if getattr(trainer, "aux_loss_enabled", False):
        watcher.first_loss = None  # a mixture's balancing loss is in it
    _check_policy(stage, float((probe.logits(prepared.model, ids, autocast=mixed) - before).abs().max()))
    reference_is_kept = stage.check_reference(trainer)
    leak = _check_packing(stage, arguments, prepared.model, mixed=mixed)
    stage.method.attach(trainer)
    _check_trainable(trainer.model, prepared.trainable, stage)
    stop_before_bad_steps(stage.name, trainer, tokenizer)
    watcher.resume = resume = checkpoint.resume_from(folder, stage.train.checkpoint_every)
    if resume.checkpoint is not None:
        refuse_foreign_objects(resume.checkpoint)
    watcher.spans = conditions.resumed(resume.checkpoint, resume.step, conditions.conditions(stage))
    set_seed(seed)  # what was drawn until here may depend on caches; what dropout draws must not
    if preemption is not None:
        preemption.training = True
    with _checkpoints_by_name_in_memory(prepared.model), suppress(_Finished):
        trainer.train(resume_from_checkpoint=None if resume.step == 0 else str(resume.checkpoint))
    if preemption is not None:
        preemption.training = False
    reference_is_kept()
    _set_router(prepared.model, router)
    # Accelerate leaves its autocast wrapped around forward: merges would be compared in bfloat16.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if preemption is not None and preemption.asked and trainer.state.global_step < trainer.state.max_steps:
        raise TryAgain(f"told to stop; kept step {trainer.state.global_step} of {trainer.state.max_steps}")
    curve = [{key: entry.get(key) for key in _CURVE} for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "sequences": len(trainer.train_dataset),
        "precision": "bfloat16" if bfloat16 else "float32",
        "device": trainer.args.device.type,
        "final_loss": curve[-1]["loss"] if curve else None,
        "curve": curve,
        "trainable_parameters": sum(p.numel() for p in prepared.model.parameters() if p.requires_grad),
        "packing_leak": leak,
        "resumed_at": resume.step,
        "conditions": watcher.spans,
    }


def _router_settings(model: Any) -> dict[str, Any]:
    """What TRL changes in the config of a mixture of experts, to get at the loss that balances its router."""
    config = model.config.get_text_config()
    return {name: getattr(config, name) for name in _ROUTER if hasattr(config, name)}


def _set_router(model: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(model.config.get_text_config(), name, value)


@contextmanager
def _checkpoints_by_name_in_memory(model: Any) -> Iterator[None]:
    """Let the trainer's checkpoints hold a mixture's experts as the model does, one parameter for all of a layer.

    transformers 5.23 writes them one by one, as hub checkpoints do, and the trainer's resume reads none of them back:
    the run goes on from the start's experts, without a word.
    """
    if hasattr(model, "peft_config"):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def _check_policy(stage: ObjectiveSpec, moved: float) -> None:
    """The trainer's constructor must leave the policy alone: an adapter set up twice moves it, silently."""
    if not moved <= probe.TOLERANCE:
        raise StageFailed(
            f"stage {stage.name}: setting up the trainer moved the policy by {moved:.2g} in logits before its first "
            "step; this is a fault of ours, please report it"
        )


def _check_packing(stage: ObjectiveSpec, arguments: dict[str, Any], model: Any, *, mixed: bool) -> float | None:
    """Documents that share a sequence must not see one another, on the attention backend in use."""
    if not arguments.get("packing") or arguments.get("packing_strategy") == "wrapped":
        return None
    with stage.method.with_exact_inputs(model):
        leak = probe.packing_leak(model, autocast=mixed)
    if not leak <= probe.TOLERANCE:
        raise StageFailed(
            f"stage {stage.name}: with this model's attention, packed documents see one another (logits move by "
            f"{leak:.2g}); switch train.packing off (in cpt, `wrapped` lets them on purpose)"
        )
    return leak


def _check_trainable(model: Any, planned: frozenset[str], stage: ObjectiveSpec) -> None:
    import torch

    actual = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not planned or actual != planned:
        extra, missing = sorted(actual - planned)[:3], sorted(planned - actual)[:3]
        raise StageFailed(
            f"stage {stage.name}: {len(actual)} parameters would train where method {stage.method.kind} planned "
            f"{len(planned)} (unplanned: {extra}, missing: {missing}); this is a fault of ours, please report it"
        )
    # TRL casts the adapters of quantised models to bfloat16, in which small updates are rounded away.
    for name, parameter in model.named_parameters():
        if name in planned:
            parameter.data = parameter.data.to(torch.float32)


def _watcher(stage: ObjectiveSpec, folder: Path, preemption: Preemption | None) -> Any:
    """A callback that reports progress, seals checkpoints and honours SIGTERM."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        first_loss: float | None = getattr(stage, "first_loss", None)
        resume: checkpoint.Resume
        spans: list[conditions.Span]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            event("progress", step=state.global_step, total=state.max_steps)
            if line := self.resume.line(state.max_steps):
                info(line)
            if state.global_step >= state.max_steps:
                raise _Finished

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            values = {key: logs.get(key) for key in ("loss", "grad_norm", "learning_rate")}
            if state.global_step == 1 and self.first_loss is not None:
                _check_first_loss(stage, logs["loss"], self.first_loss)
            event("progress", step=state.global_step, total=state.max_steps, **values)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if preemption is not None and preemption.asked:
                event("saving", step=state.global_step)
                control.should_save = True
                control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            place = folder / f"checkpoint-{state.global_step}"
            conditions.keep(self.spans, place)
            checkpoint.seal(place)
            checkpoint.prune(folder, stage.train.keep_checkpoints)

    return Watcher()


def _check_first_loss(stage: ObjectiveSpec, found: float, expected: float) -> None:
    if abs(found - expected) > FIRST_LOSS_TOLERANCE:
        raise StageFailed(
            f"stage {stage.name}: the first loss is {found:.4f}; policy and reference are the same model only "
            f"at {expected:.4f}. The reference is wrong: this is a fault of ours, please report it"
        )
