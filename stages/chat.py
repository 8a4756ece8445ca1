"""Talk to a finished model in a terminal."""

import sys
from pathlib import Path
from typing import Any

from stages.conversation import Messages
from stages.model import load_plain, load_tokenizer, training_device


def converse(model_folder: Path, prompt: str | None, max_tokens: int) -> None:
    """Answer one prompt, or every line from the terminal until an empty one, token by token.

    Raises:
        InvalidInput: the folder holds no chat model.
    """
    from transformers import logging

    from stages.conversation import render

    logging.set_verbosity_error()
    tokenizer = load_tokenizer(model_folder)
    render(tokenizer, [{"role": "user", "content": "a"}], ask=True)
    model = load_plain(model_folder, "auto", training_device()).eval()  # type: ignore[arg-type]
    messages: Messages = []
    for question in _questions(prompt):
        messages.append({"role": "user", "content": question})
        answer = _answer(model, tokenizer, messages, max_tokens)
        messages.append({"role": "assistant", "content": answer})


def _questions(prompt: str | None) -> Any:
    if prompt is not None:
        yield prompt
        return
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "").strip()
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
