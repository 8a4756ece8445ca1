"""What a row must look like, per objective. Each function normalises one row or says what is wrong with it."""

from typing import Any

ROLES = ("system", "user", "assistant", "tool")

Row = dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, the reader adds file and line."""


class BrokenFile(BadRow):
    """A place from which on a file cannot be read: what is lost behind it is not counted, so it is never left out."""


def text_row(row: Row) -> Row:
    """A document: ``{"text": str}``."""
    return {"text": _text(row, "text")}


def conversation_row(row: Row) -> Row:
    """A conversation: ``{"messages": [{"role", "content"}, ...]}``, ending with the assistant.

    Accepts `messages`, `prompt` and `completion` (strings or message lists), or Alpaca's `instruction`,
    `input` and `output`.
    """
    if "messages" in row:
        messages = _messages(row, "messages")
    elif "completion" in row:
        messages = [*_turns(row, "prompt", "user"), *_turns(row, "completion", "assistant")]
    elif "output" in row:
        extra = "" if row.get("input") in (None, "") else _text(row, "input")
        question = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(row, "output")},
        ]
    else:
        raise BadRow(f"columns {_columns(row)}; expected messages, or prompt and completion, or instruction and output")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"the last message is the {messages[-1]['role']}'s; expected the assistant's")
    return {"messages": messages}


def prompt_row(row: Row) -> Row:
    """A question, and the answer to it where one is given: ``{"prompt": messages, "reference": str | None}``.

    Accepts `messages` (a last one of the assistant is the reference), `prompt` and perhaps `completion`, or Alpaca's
    `instruction`, `input` and perhaps `output`.
    """
    if "messages" in row:
        messages = _messages(row, "messages")
    elif "prompt" in row:
        messages = _turns(row, "prompt", "user")
        if messages[-1]["role"] == "assistant":
            raise BadRow("column 'prompt' ends with the assistant's message; an answer stands in 'completion'")
        if row.get("completion") is not None:
            messages = [*messages, *_turns(row, "completion", "assistant")]
    elif "instruction" in row:
        answered = row.get("output") not in (None, "")
        messages = conversation_row(row if answered else row | {"output": "-"})["messages"]
        messages = messages if answered else messages[:-1]
    else:
        raise BadRow(f"columns {_columns(row)}; expected prompt, or messages, or instruction")
    if messages[-1]["role"] != "assistant":
        return {"prompt": messages, "reference": None}
    if len(messages) == 1 or messages[-2]["role"] == "assistant":
        raise BadRow("no question stands before the assistant's last message")
    return {"prompt": messages[:-1], "reference": messages[-1]["content"]}


def plain_prompt_row(row: Row) -> Row:
    """A `prompt_row` that can be asked without a chat template: its prompt is one message of the user."""
    found = prompt_row(row)
    if [message["role"] for message in found["prompt"]] != ["user"]:
        raise BadRow("a prompt of several messages needs the chat template (chat_template: true)")
    return found


def preference_row(row: Row) -> Row:
    """A pair: ``{"prompt": messages, "chosen": messages, "rejected": messages}``.

    The prompt is explicit (`prompt`), or implicit: what `chosen` and `rejected`, as message lists, share.
    """
    chosen = _turns(row, "chosen", "assistant")
    rejected = _turns(row, "rejected", "assistant")
    if "prompt" in row:
        prompt = _turns(row, "prompt", "user")
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt and isinstance(row["chosen"], list):
            raise BadRow("chosen and rejected share no first message, and there is no column 'prompt'")
        if not prompt:
            raise BadRow("no column 'prompt'; plain text answers need one")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if not chosen or not rejected:
        raise BadRow(f"{'rejected' if chosen else 'chosen'} has nothing after the messages that both share")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise BadRow(f"{name} is not one assistant message after the prompt")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def any_scored_row(row: Row) -> Row:
    """A row that perplexity can score: a document where there is `text`, else a conversation."""
    return text_row(row) if "text" in row else conversation_row(row)


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise BadRow(f"no column {column!r}; columns: {_columns(row)}")
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds {_kind(value)}; expected text")
    if not value.strip():
        raise BadRow(f"column {column!r} is empty")
    if "\0" in value:
        raise BadRow(f"column {column!r} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"column {column!r} holds half of a surrogate pair") from None
    return value


def _turns(row: Row, column: str, role: str) -> list[dict[str, str]]:
    if isinstance(row.get(column), (list, tuple)):
        return _messages(row, column)
    return [{"role": role, "content": _text(row, column)}]


def _messages(row: Row, column: str) -> list[dict[str, str]]:
    value = row[column]
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow(f"column {column!r} holds {_kind(value)}; expected a list of messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            raise BadRow(f"{column}[{number}] has role {repr(found)[:40]}; allowed: {', '.join(ROLES)}")
        try:
            content = _text(message, "content")
        except BadRow as error:
            raise BadRow(f"{column}[{number}]: {error}") from None
        messages.append({"role": message["role"], "content": content})
    return messages


def _columns(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    return f"{type(value).__name__} {repr(value)[:40]}"
