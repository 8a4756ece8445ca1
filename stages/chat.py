"""Talk to a finished model in a terminal, or to the adapters of several stages on one base."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.conversation import Messages
from stages.errors import InvalidInput
from stages.model import training_device
from stages.serving import BASE, AdapterSet, load, with_adapters

BATCH = 8
"""Prompts from a file that are answered at once."""


def converse(folder: Path, prompt: str | None, max_tokens: int) -> None:
    """Answer one prompt, or every line from the terminal until an empty one, token by token.

    Args:
        folder: a model or an artifact; see `stages.serving.load`.
        prompt: ask this and leave.
        max_tokens: of the longest answer.

    Raises:
        InvalidInput: the folder holds no chat model.
    """
    from stages.conversation import render

    model, tokenizer = load(folder, device=training_device())
    render(tokenizer, [{"role": "user", "content": "a"}], ask=True)
    messages: Messages = []
    for question in _questions(prompt):
        messages.append({"role": "user", "content": question})
        answer = _answer(model, tokenizer, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})


def converse_with_adapters(folders: Sequence[Path], prompts: Path | None, max_tokens: int) -> None:
    """Answer the rows of a file, each by the adapter that it names, or lines from the terminal until an empty one.

    In the terminal, `/use NAME` lets another adapter answer, or the base itself.

    Args:
        folders: artifacts of stages that started from the same model.
        prompts: JSON lines with `prompt` and `adapter`; None for a conversation.
        max_tokens: of the longest answer.

    Raises:
        InvalidInput: the artifacts cannot be served together, or a row cannot be used.
    """
    rows = None if prompts is None else _rows(prompts)
    served = with_adapters(folders)
    if rows is None:
        _talk(served, max_tokens)
        return
    for number, (name, _) in enumerate(rows, start=1):
        if name not in (*served.names, BASE):
            raise InvalidInput(
                f"{prompts}:{number}: no adapter {name!r}; there are: {', '.join((*served.names, BASE))}"
            )
    for batch in _batches(rows, mixed=served.unmixable is None):
        answers = served.generate([prompt for _, prompt in batch], [name for name, _ in batch], max_tokens)
        for (name, prompt), answer in zip(batch, answers, strict=True):
            print(json.dumps({"adapter": name, "prompt": prompt, "answer": answer}, ensure_ascii=False))  # noqa: T201


def _batches(rows: list[tuple[str, str]], *, mixed: bool) -> Iterator[list[tuple[str, str]]]:
    """Rows in their order, some at a time; of one adapter each where a batch cannot mix them."""
    batch: list[tuple[str, str]] = []
    for row in rows:
        if batch and (len(batch) == BATCH or not (mixed or row[0] == batch[0][0])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _rows(file: Path) -> list[tuple[str, str]]:
    """Adapter and prompt of each row."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{file}:{number}: not JSON: {error}") from error
        if not (isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("adapter"), str)):
            raise InvalidInput(f"{file}:{number}: a row has two texts, `prompt` and `adapter`, and here one is missing")
        rows.append((row["adapter"], row["prompt"]))
    if not rows:
        raise InvalidInput(f"{file}: no rows")
    return rows


def _talk(served: AdapterSet, max_tokens: int) -> None:
    print(f"adapters: {', '.join((*served.names, BASE))}; /use NAME switches, an empty line ends", file=sys.stderr)  # noqa: T201
    for line in _questions(None, served):
        command, _, name = line.partition(" ")
        if command == "/use":
            try:
                served.switch(name.strip())
            except InvalidInput as error:
                print(error, file=sys.stderr)  # noqa: T201
            continue
        print(served.generate([line], max_tokens=max_tokens)[0])  # noqa: T201


def _questions(prompt: str | None, served: AdapterSet | None = None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    while True:
        who = "you" if served is None else f"you to {served.active}"
        try:
            line = input(f"{who}: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _answer(model: Any, tokenizer: Any, messages: Messages, max_tokens: int) -> str:
    from transformers import TextStreamer

    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False, streamer=streamer)
    return str(tokenizer.decode(ids[0][encoded["input_ids"].shape[1] :], skip_special_tokens=True))
