"""Decisions of people: a stage that its gates refuse goes on, or ends, because somebody said so and why.

A decision is a sealed document beside the artifact, one for each question. The question is the artifact with what its
gates came to: a threshold that is edited, or a new measurement, asks again; going back to the old one finds the old
answer. Nothing here knows Prefect, so a decision outlives every server.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from specs.base import fingerprint
from specs.printable import printable_line
from specs.secrets import redact
from stages.artifact import DECISIONS, VERDICT, lock_file
from stages.documents import make_folder, read_sealed, write_sealed
from stages.errors import AwaitingApproval, GateRefused, InvalidInput
from stages.gate import Verdict
from stages.lock import exclusive
from stages.plan import Plan, Step

LOCK = ".decision"
"""How the name of the lock ends under which a decision is taken."""
LONGEST = {"who": 200, "why": 2000}
"""Characters that a decision's texts may have."""
JUDGED = ("gate", "outcome", "value", "reference", "low", "high", "confidence", "n")
"""What of a verdict was decided on: the rule and its numbers, not the words that tell them."""

Answer = Literal["approve", "reject"]
PAST: dict[str, str] = {"approve": "approved", "reject": "rejected"}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person said."""

    answer: Answer
    who: str
    when: str
    """UTC, ISO 8601, to the second."""
    why: str
    question: str
    """`Question.key`: what was decided on."""

    @property
    def approved(self) -> bool:
        """Whether the chain may go on."""
        return self.answer == "approve"

    def __str__(self) -> str:
        """One line for people."""
        return printable_line(f"{PAST[self.answer]} by {self.who} on {self.when}: {self.why}")

    def as_record(self) -> dict[str, Any]:
        """For verdict files, reports and model cards."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Question:
    """A stage that its gates refuse, and whose spec says that a person decides."""

    step: Step
    verdicts: tuple[Verdict, ...]

    @property
    def key(self) -> str:
        """sha256 (hex) of the artifact's identity and of what its gates came to."""
        judged = [{name: getattr(one, name) for name in JUDGED} for one in self.verdicts]
        return fingerprint({"artifact": self.step.key, "gates": judged})

    @property
    def file(self) -> Path:
        """Where the decision is kept."""
        return self.step.place / DECISIONS / f"{self.key[:16]}.json"


def question_of(step: Step, verdicts: Sequence[Verdict]) -> Question | None:
    """What a person is asked about a step; None where its gates pass, or the spec asks nobody."""
    if step.policy != "approve" or all(one.passed for one in verdicts):
        return None
    return Question(step, tuple(verdicts))


def questions(plan: Plan) -> list[Question]:
    """Every step of a plan that is published and measured, and that a person has to decide on, or has decided on."""
    judged = [step for step in plan.steps if step.artifact is not None and not step.missing]
    return [asked for step in judged if (asked := question_of(step, plan.verdicts(step))) is not None]


def decision_on(question: Question) -> Decision | None:
    """The decision that is kept, or None where there is none that can be believed; see `unbelievable`."""
    try:
        return _read(question)
    except InvalidInput:
        return None


def decision_about(step: Step, verdicts: Sequence[Verdict]) -> Decision | None:
    """What a person said to the gates of a step; None where nobody was asked, or has answered."""
    asked = question_of(step, verdicts)
    return None if asked is None else decision_on(asked)


def unbelievable(question: Question) -> str:
    """Why a decision that lies there counts as none; empty where there is nothing wrong."""
    try:
        _read(question)
    except InvalidInput as error:
        return f"{error}; it counts as none"
    return ""


def _read(question: Question) -> Decision | None:
    file = question.file
    if not file.exists() and not file.is_symlink():
        return None
    body = read_sealed(file)
    names = {one.name for one in fields(Decision)}
    if not isinstance(body, dict) or set(body) != names or not all(isinstance(one, str) for one in body.values()):
        raise InvalidInput(f"{file}: not a decision")
    if body["answer"] not in PAST or body["question"] != question.key:
        raise InvalidInput(f"{file}: a decision on something else")
    return Decision(**body)


def decide(plan: Plan, question: Question, answer: Answer, *, who: str, why: str) -> Decision:
    """Keep a person's decision, unless there is one: the first counts.

    Args:
        plan: that the question is from.
        question: what is decided.
        answer: approve or reject.
        who: the person. Secrets in it, and in ``why``, are left out.
        why: the reason, one line.

    Returns:
        The decision that counts: this one, or the one that came first.

    Raises:
        InvalidInput: who or why is empty or too long.
        TryAgain: somebody is deciding this very moment.
    """
    said = {"who": _text("who", who), "why": _text("why", why)}
    with exclusive(lock_file(plan.store, question.step.work.name, LOCK), f"the decision on {question.step.name}"):
        if (first := decision_on(question)) is not None:
            return first
        when = datetime.now(UTC).isoformat(timespec="seconds")
        made = Decision(answer=answer, when=when, question=question.key, **said)
        make_folder(question.file.parent)
        if question.file.is_symlink():
            question.file.unlink()
        write_sealed(question.file, made.as_record())
        record_verdict(question.step, question.verdicts)
    return made


def record_verdict(step: Step, verdicts: Sequence[Verdict]) -> None:
    """Keep beside a step's artifact what its gates came to, and what a person said to that."""
    write_sealed(step.place / VERDICT, verdict_record(step, verdicts))


def verdict_record(step: Step, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The verdict file of a step: every gate, whether all passed, and the decision where they did not."""
    decision = decision_about(step, verdicts)
    record = {"gates": [one.as_record() for one in verdicts], "passed": all(one.passed for one in verdicts)}
    return record if decision is None else {**record, "decision": decision.as_record()}


def _text(name: str, text: str) -> str:
    """One line, without secrets, that any file takes: an argument may hold bytes that are no text."""
    line = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
    if not line:
        raise InvalidInput(f"{name} is empty; a decision says who took it and why")
    if len(line) > LONGEST[name]:
        raise InvalidInput(f"{name} has {len(line):,} characters; at most {LONGEST[name]:,} are kept")
    return redact(printable_line(line), os.environ)


def require_approval(question: Question, line: str, *, approve: str, run: str) -> None:
    """Go on only where a person said so.

    Args:
        question: what is asked.
        line: what the gates came to.
        approve: the command that approves, but for the reason.
        run: the command that goes on then.

    Raises:
        AwaitingApproval: nobody has decided yet.
        GateRefused: it was rejected.
    """
    title, decision = question.step.title, decision_on(question)
    if decision is None:
        wrong = unbelievable(question)
        raise AwaitingApproval(
            f"stage {title} waits for a person: {line}. {wrong + '. ' if wrong else ''}"
            f'Decide with `{approve} --why "..."` (or reject), then go on with `{run}`: nothing is made twice',
            question.key,
        )
    if not decision.approved:
        raise GateRefused(f"stage {title}: {decision}. {line}")


def standing(question: Question) -> str:
    """One line for plans and tables: what was decided, or what to do."""
    if (decision := decision_on(question)) is not None:
        return str(decision)
    wrong = unbelievable(question)
    said = "waits for a person: `trivium approve` or `trivium reject`, with --why"
    return f"{said} ({printable_line(wrong)})" if wrong else said
