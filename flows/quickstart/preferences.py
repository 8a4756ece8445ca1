"""Pairs of a short right answer and a worse one, for the preference stage."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from flows.quickstart.instructions import nameless, what, which
from flows.quickstart.library import Entry
from flows.quickstart.rows import dice, mixed

_KINDS = ("verbose", "evasive", "wrong")
_TRAIN_PAIRS, _HELDOUT_PAIRS = 402, 120
_LONGEST_PADDED = 80  # characters of a summary that still leave room for padding around it

Row = dict[str, str]


@dataclass(frozen=True)
class Wording:
    """The parts that worse answers are put together from."""

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    shrug: tuple[str, ...]
    excuse: tuple[str, ...]
    advice: tuple[str, ...]


# No part is in both: preferring the short answer in a held-out pair takes more than knowing these phrases.
_TRAIN = Wording(
    opening=(
        "That is a great question!",
        "Thank you for asking about this.",
        "Sure, I would be happy to help you with that!",
        "Let me explain this step by step.",
        "Python is a very popular programming language.",
        "Before I answer, some background may help.",
        "As you may already know, `{home}` has many parts.",
        "Well, there is a lot to say about `{path}`.",
        "Of course! Let us dive right in.",
        "Many people wonder about `{leaf}`.",
        "To answer this, we first look at the name.",
        "Absolutely, this comes up all the time.",
    ),
    closing=(
        "I hope this helps! Let me know if you have other questions.",
        "As you can see, it is a very useful and powerful tool for many tasks.",
        "In summary, this is what it does, as was explained above.",
        "It is important to note that it is used by many programmers every day.",
        "Feel free to ask me anything else about Python at any time.",
        "There is of course much more that could be said about this topic.",
        "Remember that practice makes perfect when you learn to program.",
        "This makes it one of the many interesting things in the library.",
        "Overall, it plays an important role in a wide range of programs.",
        "You can use it in your own projects, large or small.",
        "To conclude, that is the main idea behind it.",
        "Many developers find it helpful in their daily work.",
    ),
    shrug=(
        "It depends.",
        "That depends on what you want to do.",
        "It is hard to say in general.",
        "There are many ways to look at this.",
        "I am not sure about that.",
        "Different people use it in different ways.",
        "This can vary a lot.",
        "It could do several things.",
    ),
    excuse=(
        "The answer changes from case to case.",
        "Without more context, `{leaf}` could mean a number of things.",
        "`{home}` is large and I cannot speak for all of it.",
        "A lot is decided by your version and your system.",
        "Some call it useful and others never touch it.",
        "It would not be right to give one simple answer.",
        "",
    ),
    advice=(
        "Please look it up in the documentation.",
        "You may want to ask an expert.",
        "Try it and see what happens.",
        "Can you tell me more about your project?",
        "Searching the web might give you an idea.",
        "It is best to read the source code.",
        "",
    ),
)
_HELDOUT = Wording(
    opening=(
        "What a wonderful thing to be curious about!",
        "Glad you brought this up.",
        "The standard library has grown over decades.",
        "Okay, so here is the thing about `{leaf}`.",
        "First of all, a few general remarks are in order.",
        "Names such as `{path}` can look confusing at first sight.",
    ),
    closing=(
        "Should anything remain unclear, simply write to me again.",
        "And that, in a nutshell, is the whole story from beginning to end.",
        "It goes without saying that good code needs careful thought.",
        "Beginners and professionals alike come across it sooner or later.",
        "Keep exploring, since every module has its own surprises.",
        "With that in mind, you are well prepared for what lies ahead.",
    ),
    shrug=(
        "Opinions differ on this one.",
        "I could not tell you exactly.",
        "Maybe one thing, maybe another.",
        "No single reply covers it.",
    ),
    excuse=(
        "So much hinges on circumstances that I do not know.",
        "Anything about `{home}` has to be judged with its surroundings.",
        "What holds in one program fails in the next.",
        "",
    ),
    advice=(
        "Have you considered checking the manual?",
        "A colleague would probably know.",
        "Perhaps start with a tutorial.",
        "",
    ),
)


def preferences(train: Sequence[Entry], asked: Sequence[Entry]) -> tuple[list[Row], list[Row]]:
    """Return the pairs for training and the pairs held out, the three kinds about evenly in each."""
    return _pairs(train, _TRAIN_PAIRS, _TRAIN, "train"), _pairs(asked, _HELDOUT_PAIRS, _HELDOUT, "held-out")


def _pairs(entries: Sequence[Entry], count: int, wording: Wording, purpose: str) -> list[Row]:
    neighbours: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        neighbours[entry.home, entry.kind].append(entry)
    quota = dict.fromkeys(_KINDS, count // len(_KINDS))
    rows = []
    for entry in mixed(entries, f"{purpose} pairs"):
        mistaken = [other for other in neighbours[entry.home, entry.kind] if _confusable(entry, other)]
        fits = {"verbose": len(entry.summary) <= _LONGEST_PADDED, "evasive": True, "wrong": bool(mistaken)}
        open_kinds = [kind for kind in _KINDS if fits[kind] and quota[kind]]
        if open_kinds:
            kind = max(open_kinds, key=lambda kind: (quota[kind], kind))
            quota[kind] -= 1
            rows.append(_pair(entry, kind, mistaken, wording, purpose))
    return mixed(rows, f"{purpose} preference rows")


def _pair(entry: Entry, kind: str, mistaken: list[Entry], wording: Wording, purpose: str) -> Row:
    draw = dice(f"{purpose} {kind} {entry.path}")
    question, chosen = what(entry, purpose)
    if kind == "verbose":
        rejected = " ".join([draw.choice(wording.opening), entry.summary, draw.choice(wording.closing)])
    elif kind == "evasive":
        parts = [draw.choice(wording.shrug), draw.choice(wording.excuse), draw.choice(wording.advice)]
        rejected = " ".join(part for part in parts if part)
    else:
        other = draw.choice(mistaken)
        rejected = other.summary
        if nameless(entry) and draw.random() < 0.3:  # the other way round: the right task, the wrong name
            question, _ = which(entry, purpose)
            chosen, rejected = f"`{entry.path}`", f"`{other.path}`"
    if kind != "wrong":
        rejected = rejected.format(path=entry.path, leaf=entry.leaf, home=entry.home)
    return {"prompt": question, "chosen": chosen, "rejected": rejected, "kind": kind}


def _confusable(entry: Entry, other: Entry) -> bool:
    """Tell whether the other's summary is wrong for the entry, yet about as long."""
    return other.summary != entry.summary and 0.5 <= len(other.summary) / len(entry.summary) <= 2.0
