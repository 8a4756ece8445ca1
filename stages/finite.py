"""Numbers that are no numbers: weights by their names, and a watch over every optimizer step before it is taken."""

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stages.errors import StageFailed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer

IGNORED = -100
"""The label that a loss skips."""
SHOWN = 8
"""Rows of a bad batch that a message shows; the rest is counted."""
CUT = 72
"""Characters that are shown of a row."""
_DECODED = 48  # tokens: enough for `CUT` characters in most scripts


def not_finite(model: "torch.nn.Module", *, trained: bool = False) -> str:
    """The first parameters that hold inf or nan, by name; empty where none does.

    Args:
        model: on any device.
        trained: look only at parameters that train.
    """
    import torch

    floats = (
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and (parameter.requires_grad or not trained)
    )
    return ", ".join([name for name, parameter in floats if not bool(torch.isfinite(parameter).all())][:3])


def stop_before_bad_steps(stage: str, trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let a trainer end with `StageFailed` before a step, or a checkpoint, that holds inf or nan.

    Args:
        stage: the stage's name, for messages.
        trainer: set up, with all its other callbacks, and not started yet.
        tokenizer: turns the rows of a bad batch into text again.
    """
    from transformers import TrainerCallback

    steps = _Steps(stage, trainer, tokenizer)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any
        ) -> None:
            rate = float(optimizer.param_groups[0]["lr"])
            steps.check(state.global_step + 1, state.max_steps, rate, model)

        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            if control.should_save:
                _check_updated(stage, state.global_step, model)

    trainer.add_callback(Watch())


def _check_updated(stage: str, step: int, model: "torch.nn.Module") -> None:
    """A step from finite gradients can still overflow; a checkpoint of it would only be resumed to fail."""
    if broken := not_finite(model, trained=True):
        raise StageFailed(
            f"stage {stage}: optimizer step {step} left inf or nan in {broken}; no checkpoint is written of it, and "
            "nothing is published. Lower train.learning_rate, and run again"
        )


class _Steps:
    """Losses and gradient norm of the optimizer step at work, looked at before the step is taken.

    Losses stay on their device until the last micro batch: one synchronisation per optimizer step, whether it is
    logged or not.
    """

    def __init__(self, stage: str, trainer: "Trainer", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Listen to ``trainer``, whose callback then asks `check` before each of its steps."""
        self._stage, self._tokenizer = stage, tokenizer
        self._losses: list[torch.Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._norm: Any = None
        take_micro_batch, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> "torch.Tensor":
            self._batches.append(dict(inputs))
            loss: torch.Tensor = take_micro_batch(model, inputs, *rest, **named)
            self._losses.append(loss.detach())
            return loss

        def clip_grad_norm_(*arguments: Any, **named: Any) -> Any:
            self._norm = clip(*arguments, **named)
            return self._norm

        trainer.training_step = training_step
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_

    def check(self, step: int, steps: int, learning_rate: float, model: "torch.nn.Module") -> None:
        """Let the step be taken, or stop here.

        Args:
            step: the number of the optimizer step that is about to be taken, from 1.
            steps: how many there will be.
            learning_rate: of this step.
            model: the one that trains.

        Raises:
            StageFailed: a loss or the gradient norm is inf or nan.
        """
        import torch

        losses = torch.stack([loss.float().reshape(()) for loss in self._losses])
        norm = losses.new_tensor(0.0) if self._norm is None else torch.as_tensor(self._norm).to(losses).reshape(())
        values = torch.cat([losses, norm[None]]).tolist()
        batches, known = self._batches, self._norm is not None
        self._losses, self._batches, self._norm = [], [], None
        if all(map(math.isfinite, values)):
            return
        *each, grad_norm = values
        bad = [number for number, loss in enumerate(each) if not math.isfinite(loss)]
        what = [name for name, found in (("loss", bad), ("grad norm", not math.isfinite(grad_norm))) if found]
        verb = "are" if len(what) > 1 else "is"
        numbers = f"loss {sum(each):.4g}, grad norm {f'{grad_norm:.4g}' if known else 'unknown'}"
        raise StageFailed(
            f"stage {self._stage}: {' and '.join(what)} {verb} not finite at step {step} of {steps} ({numbers}, "
            f"learning rate {learning_rate:g}); stopped before the optimizer step: no weight or checkpoint took it, "
            f"and nothing is published.\n{self._cause(batches, bad, model)}"
        )

    def _cause(self, batches: list[dict[str, Any]], bad: list[int], model: "torch.nn.Module") -> str:
        blamed = batches[bad[0]] if bad else None
        rows = [
            row for batch in (batches if blamed is None else [blamed]) for row in learned_rows(batch, self._tokenizer)
        ]
        count = len(batches)
        where = f"micro batch {bad[0] + 1} of {count}" if bad else f"the step's {count} micro batches"
        more = [f"  ... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        shown = "\n".join([f"  {row}" for row in rows[:SHOWN]] + more)
        broken = not_finite(model)
        if broken:
            before = "an earlier step broke the weights, not these rows: they hold inf or nan"
            remedy = "Lower train.learning_rate or train.max_grad_norm"
            lead = f"In {where} ({before} in {broken})"
        else:
            remedy = "Look at these rows in the data; if they are sound, lower train.learning_rate"
            lead = f"In {where}"
        return (
            f"{lead}; what is learned of its rows begins with\n{shown}\n{remedy}, and run again: "
            "as it is, a rerun would come to the same step"
        )


def learned_rows(batch: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """The beginning of what is learned of each row of a batch, as JSON would write it: what a search of the data finds.

    Args:
        batch: what a trainer's collator made: `input_ids` of shape (rows, length), and labels or a mask.
        tokenizer: that made the ids.
    """
    for ids, learned in _sequences(batch, _labels(batch)):
        first = next(place for place, label in enumerate(learned) if label != IGNORED)
        first = 0 if first == 1 else first  # nothing predicts a document's first token: packing takes its label away
        yield _quoted(tokenizer.decode(ids[first : first + _DECODED], skip_special_tokens=True))


def _labels(batch: dict[str, Any]) -> "torch.Tensor":
    """What is learned of a batch, in the form of labels; pairs have a mask instead, and their chosen half is shown."""
    if "labels" in batch:
        labels: torch.Tensor = batch["labels"]
        return labels
    ids: torch.Tensor = batch["input_ids"]
    return ids.masked_fill(batch["completion_mask"] == 0, IGNORED)[: len(ids) // 2]


def _sequences(batch: dict[str, Any], labels: "torch.Tensor") -> Iterator[tuple[list[int], list[int]]]:
    """The documents of a batch; where several share a row, their positions start again."""
    ids, positions = batch["input_ids"].tolist(), batch.get("position_ids")
    for number, learned in enumerate(labels.tolist()):
        starts = [0]
        if positions is not None:
            starts = [place for place, position in enumerate(positions[number].tolist()) if position == 0] or [0]
        for start, end in zip(starts, [*starts[1:], len(learned)], strict=True):
            if any(label != IGNORED for label in learned[start:end]):
                yield ids[number][start:end], learned[start:end]


def _quoted(text: str) -> str:
    written = json.dumps(text if len(text) <= CUT else text[:CUT], ensure_ascii=False)
    safe = "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in written)
    return safe if len(text) <= CUT else f'{safe[:-1]}..."'
