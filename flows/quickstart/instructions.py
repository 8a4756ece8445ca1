"""Short questions about callables with short answers, for the instruction stage."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flows.quickstart.library import Entry
from flows.quickstart.rows import dice, mixed

_WHAT_ROWS, _WHICH_ROWS, _ARGUMENT_ROWS, _IMPORT_ROWS = 1_000, 400, 250, 150
_HELDOUT_WHAT, _HELDOUT_WHICH = 48, 16

# The nouns put a class or a method where a function is meant: "the {noun} `x`" reads right for each.
_WHAT = (
    "What does `{path}` do?",
    "What is `{path}` for?",
    "In one sentence, what does `{path}` do?",
    "Describe `{path}` briefly.",
    "Explain the {noun} `{path}` in one sentence.",
    "What is the purpose of `{path}` in Python?",
    "What does the {noun} `{leaf}` from `{home}` do?",
    "Python's `{path}`: what is it good for?",
    "Tell me what `{path}` does.",
)
_WHICH = (
    "Which {noun} in `{home}` {does}?",
    "What {noun} of `{home}` {does}?",
    "I need a {noun} that {does}. What does `{home}` offer?",
)
_WHICH_BY_SUMMARY = (
    "Which {noun} in `{home}` is described like this? {summary}",
    "Name the {noun} in `{home}` that matches: {summary}",
    "`{home}` has a {noun} documented so: {summary} What is it called?",
)
_ARGUMENTS = (
    "What arguments does `{path}` take?",
    "Which parameters does `{path}` accept?",
    "List the parameters of `{path}`.",
    "What do I pass to `{path}`?",
)
_IMPORT = (
    ("How do I import `{leaf}`?", "`from {home} import {leaf}`"),
    ("Show the import statement for `{leaf}`.", "`from {home} import {leaf}`"),
    ("Which module provides `{leaf}`?", "`{home}`"),
    ("Where in the standard library is `{leaf}`?", "In `{home}`."),
)

# A summary that starts with one of these becomes "which function returns ...?"; others are quoted.
_VERB_LIST = """
    add append build calculate call change check clear close compare compute convert copy count create
    decode delete determine display divide dump encode escape evaluate execute extract fill find format
    generate get indicate insert install iterate join list load look make mark merge move open parse perform
    pop print produce put raise read receive register release remove rename replace report reset restore
    retrieve return reverse rotate round run save schedule search send set shut skip sort split start stop
    strip submit suspend test transform translate truncate turn unregister update validate verify wait wrap
    write yield
"""
_VERBS = frozenset(_VERB_LIST.split())

Row = dict[str, Any]


def instructions(train: Sequence[Entry], asked: Sequence[Entry]) -> tuple[list[Row], list[Row]]:
    """Return the rows for training and the rows held out."""
    leaves = Counter(entry.leaf.lower() for entry in train)
    summaries = Counter(entry.summary for entry in train)
    findable = [entry for entry in train if summaries[entry.summary] == 1 and nameless(entry)]
    countable = [entry for entry in train if _countable(entry)]
    importable = [
        entry
        for entry in train
        if leaves[entry.leaf.lower()] == 1 and entry.kind != "method" and entry.module != "builtins"
    ]
    pairs = [what(entry, "train") for entry in mixed(train, "what")[:_WHAT_ROWS]]
    pairs += [which(entry, "train") for entry in mixed(findable, "which")[:_WHICH_ROWS]]
    pairs += [_arguments(entry) for entry in mixed(countable, "arguments")[:_ARGUMENT_ROWS]]
    pairs += [_import(entry) for entry in mixed(importable, "import")[:_IMPORT_ROWS]]

    order = mixed(asked, "held-out instructions")
    heldout = [what(entry, "held-out") for entry in order[:_HELDOUT_WHAT]]
    heldout += [which(entry, "held-out") for entry in order[_HELDOUT_WHAT:][:_HELDOUT_WHICH]]
    return (
        [_row(*pair) for pair in mixed(pairs, "instructions")],
        [_row(*pair) for pair in mixed(heldout, "held-out rows")],
    )


def what(entry: Entry, purpose: str) -> tuple[str, str]:
    """Ask what a callable does."""
    template = dice(f"{purpose} what {entry.path}").choice(_WHAT)
    return _filled(template, entry), entry.summary


def which(entry: Entry, purpose: str) -> tuple[str, str]:
    """Ask which callable does something."""
    verb, _, rest = entry.summary.rstrip(".").partition(" ")
    # "Lock and return" has two verbs, and a question of two sentences is none.
    known = {verb.lower(), verb.lower().removesuffix("s")} & _VERBS
    inflects = bool(known) and not re.search(r" and |\. |;", rest)
    template = dice(f"{purpose} which {entry.path}").choice(_WHICH if inflects else _WHICH_BY_SUMMARY)
    question = _filled(template, entry, does=f"{_third_person(verb.lower())} {rest}")
    return question, f"`{entry.path}`: {entry.summary}"


def nameless(entry: Entry) -> bool:
    """Tell whether the summary can be quoted in a question without naming the answer."""
    return entry.leaf.lower() not in entry.summary.lower()


def _arguments(entry: Entry) -> tuple[str, str]:
    template = dice(f"arguments {entry.path}").choice(_ARGUMENTS)
    required = ", ".join(f"`{parameter.name}`" for parameter in entry.parameters if parameter.required)
    optional = ", ".join(f"`{parameter.name}`" for parameter in entry.parameters if not parameter.required)
    parts = [f"Required: {required}." if required else "", f"Optional: {optional}." if optional else ""]
    return _filled(template, entry), " ".join(part for part in parts if part)


def _import(entry: Entry) -> tuple[str, str]:
    question, answer = dice(f"import {entry.path}").choice(_IMPORT)
    return _filled(question, entry), _filled(answer, entry)


def _countable(entry: Entry) -> bool:
    return (
        0 < len(entry.parameters) <= 6
        and "*args" not in entry.signature
        and not any(parameter.name.startswith("_") for parameter in entry.parameters)
    )


def _filled(template: str, entry: Entry, does: str = "") -> str:
    return template.format(
        path=entry.path, leaf=entry.leaf, home=entry.home, noun=entry.kind, summary=entry.summary, does=does
    )


def _third_person(verb: str) -> str:
    if verb not in _VERBS:  # "Returns", as some docstrings have it
        return verb
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


def _row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
