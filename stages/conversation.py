"""Chat templates applied, with a mask over what the assistant says.

Masks come from character offsets: render the conversation with and without each assistant turn, and mark
the tokens between. So any template works that renders a conversation's beginning the same way whatever
follows, and none has to carry markers of its own.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from stages.errors import InvalidInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end_of_document|>")
"""Tokens that base models were pre-trained to see after a document, where the vocabulary has them."""


class Encoded(NamedTuple):
    """A sequence and which of its tokens are learned or scored."""

    ids: list[int]
    mask: list[bool]


def render(tokenizer: "PreTrainedTokenizerBase", messages: Messages, *, ask: bool = False) -> str:
    """The conversation as text; with ``ask``, followed by the opening of the assistant's turn.

    Raises:
        InvalidInput: the tokenizer has no chat template, it refuses these messages, or breaks its bounds.
    """
    if not tokenizer.chat_template:
        raise InvalidInput(
            "the model's tokenizer has no chat template: name one in the spec (model.chat_template: a Jinja file)"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except InvalidInput as error:
        raise InvalidInput(f"{tokenizer.name_or_path}: {error}") from error
    except Exception as error:  # a template is a program and raises what it likes
        shown = f"{messages!r:.200}{'' if len(repr(messages)) <= 200 else '...'}"
        raise InvalidInput(
            f"{tokenizer.name_or_path}: the chat template fails on {shown}: {' '.join(str(error).split())}; correct or "
            "leave out such rows, or name a template that takes them (model.chat_template)"
        ) from error
    return str(text)


def encode_conversation(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> Encoded:
    """The whole conversation; the mask covers each assistant turn and the token that ends it.

    Raises:
        InvalidInput: the template renders the beginning of a conversation differently once it goes on.
    """
    text = render(tokenizer, messages)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = render(tokenizer, messages[:number], ask=True)
        through = render(tokenizer, messages[: number + 1])
        if not (text.startswith(opening) and text.startswith(through)):
            raise InvalidInput(
                "the chat template renders the beginning of a conversation differently once it goes on, so "
                "the assistant's part cannot be told; name another one in the spec (model.chat_template)"
            )
        spans.append((len(opening), len(through)))
    return _encode(tokenizer, text, spans)


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str, spans: list[tuple[int, int]]) -> Encoded:
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    special = special_ids(tokenizer)
    mask = [False] * len(ids)
    for start, end in spans:
        for position, (token, (first, last)) in enumerate(zip(ids, offsets, strict=True)):
            if first < start or last > end or first == last:
                continue
            mask[position] = True
            if token in special:
                break  # what a template puts after the turn's end belongs to nobody
    return Encoded(ids, mask)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Every control token: the named ones (bos, eos, ...) and those that the vocabulary marks as special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def turn_terminator(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The special token with which the template ends an assistant turn, or None where it has none."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    encoded = encode_conversation(tokenizer, messages)
    last = [token for token, marked in zip(*encoded, strict=True) if marked][-1]
    return last if last in special_ids(tokenizer) else None


def end_of_text(tokenizer: "PreTrainedTokenizerBase", wanted: str | None) -> int:
    """The token that ends a document in CPT: the wanted one, or the vocabulary's end-of-text token.

    The tokenizer's eos is the last resort: in chat models it ends a turn, and raw text must not teach that.

    Raises:
        InvalidInput: the wanted token is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            raise InvalidInput(f"document_end {wanted!r} is not a token of this model")
        return int(vocabulary[wanted])
    for token in END_OF_TEXT:
        if token in vocabulary:
            return int(vocabulary[token])
    if tokenizer.eos_token_id is None:
        raise InvalidInput("the tokenizer has no end-of-text token: name one (train.document_end)")
    return int(tokenizer.eos_token_id)
