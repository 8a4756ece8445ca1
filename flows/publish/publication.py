"""What would go out of a released model, and every reason why it may not.

What goes: the files of the release as its manifest names them, its card, the verdicts, and a sealed list of all that
with hashes. Nothing else that lies in the artifact's folder, and nothing that looks like a secret.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from flows.engine import Run
from flows.model_card import card_text
from specs.base import Spec
from specs.paths import Sha256
from specs.secrets import looks_like_secret, redact
from stages.approval import decision_about, question_of, standing, verdict_record
from stages.artifact import ADAPTER, CARD, MODEL, Artifact, short, verified
from stages.errors import GateRefused, InvalidInput, StageFailed, TriviumError
from stages.gate import Verdict
from stages.manifest import Inside
from stages.plan import RELEASE, Plan, Step
from stages.serving import PUBLISHED_BASE

VERDICTS = "verdicts.json"
MANIFEST = "publication.json"
_SEARCHED = (".json", ".jinja", ".txt", ".py", ".md")
"""Files in which a secret could stand; of a tokenizer's vocabulary, none."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


class Published(Spec):
    """What a publication says of itself, in `MANIFEST`: enough to know it again and to see what was changed."""

    format: Literal[1] = 1
    pipeline: str
    identity: Sha256
    """Of the release."""
    files: dict[Inside, Sha256]
    """All but this list itself."""


@dataclass(frozen=True)
class Publication:
    """What would go."""

    plan: Plan
    release: Artifact
    files: dict[str, Path]
    """The release's own: name in the publication -> where it is now."""
    hashes: dict[str, str]
    """sha256 by name in the publication, as the release's manifest has it."""
    texts: dict[str, str]
    """What is written for the publication, by name."""

    @property
    def name(self) -> str:
        """The pipeline's."""
        return self.plan.pipeline.name

    @property
    def tag(self) -> str:
        """What this release is called among those of its pipeline."""
        return f"release-{short(self.release.identity)}"


def gather(asked: Run, *, with_warnings: bool) -> tuple[Publication | None, list[TriviumError]]:
    """What would be published of a spec, as far as there is something, and every reason why it may not be.

    Args:
        asked: the spec and the root.
        with_warnings: let gates pass that did not, where the spec says `on_gate_failure: warn`.
    """
    plan = asked.plan()
    against = [*_unfinished(plan), *_refused(plan, with_warnings=with_warnings)]
    release = plan.steps[-1].artifact
    if plan.steps[-1].name != RELEASE or release is None or any(step.artifact is None for step in plan.steps):
        return None, against
    try:
        verified(release)
    except StageFailed as error:
        against.append(error)
    files, hashes = gathered_files(release)
    with_card = {CARD: card_text(plan, asked.spec, "."), VERDICTS: _verdicts(plan)}
    publication = Publication(plan, release, files, hashes, with_card)
    return publication, against + _secrets(publication)


def _unfinished(plan: Plan) -> Iterator[TriviumError]:
    for step in plan.steps:
        if step.damaged is not None:
            yield StageFailed(f"{step.damaged}: {step.reason}; `trivium run` makes it anew")
    if plan.pending and not any(step.damaged is not None for step in plan.steps):
        names = ", ".join(step.title for step in plan.pending)
        yield InvalidInput(f"not all is made and measured: {names}; `trivium run` first")


def _refused(plan: Plan, *, with_warnings: bool) -> Iterator[TriviumError]:
    for step in plan.steps:
        verdicts = _judged(plan, step)
        against = [one for one in verdicts if not one.passed]
        if not against:
            continue
        asked = question_of(step, verdicts)
        decision = decision_about(step, verdicts)
        if decision is not None and decision.approved:
            continue
        warned = step.policy == "warn"
        if warned and with_warnings:
            continue
        reasons = " | ".join(one.reason for one in against)
        said = "" if asked is None else f"; {standing(asked)}"
        hint = "; --with-warnings publishes it all the same, and its card says so" if warned else said
        who = "the release" if step.stage is None else f"stage {step.title}"
        yield GateRefused(f"{who}: {reasons}{hint}")


def _judged(plan: Plan, step: Step) -> list[Verdict]:
    ready = step.artifact is not None and not step.missing
    return plan.verdicts(step) if ready else []


def gathered_files(release: Artifact) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a release by their names in a publication, and their sha256.

    A plain checkpoint goes as it is. An adapter goes as PEFT's loaders expect it, its base in a folder below: beside
    it, a plain loader would take the base for the model.
    """
    above = MODEL if release.adapter is None else ADAPTER
    places = {above: "", MODEL: f"{PUBLISHED_BASE}/"} if above != MODEL else {MODEL: ""}
    files, hashes = {}, {}
    for name, entry in release.manifest["files"].items():
        folder, _, rest = name.partition("/")
        if folder in places:
            files[places[folder] + rest] = release.path / name
            hashes[places[folder] + rest] = entry["sha256"]
    return dict(sorted(files.items())), hashes


def _verdicts(plan: Plan) -> str:
    stages = [
        {
            "stage": step.name,
            "identity": step.key,
            "attempt": step.attempt,
            "on_gate_failure": step.policy,
            **verdict_record(step, _judged(plan, step)),
        }
        for step in plan.steps
        if step.stage is not None or _judged(plan, step)
    ]
    document = {"pipeline": plan.pipeline.name, "release": plan.steps[-1].key, "stages": stages}
    return redact(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", os.environ)


def _secrets(publication: Publication) -> list[TriviumError]:
    """Files in which something looks like a secret, or is one of this environment: what goes out never comes back."""
    found: list[TriviumError] = []
    for name, file in publication.files.items():
        if PurePosixPath(name).suffix not in _SEARCHED or PurePosixPath(name).name in _VOCABULARIES:
            continue
        with suppress(OSError):  # a file that is missing was told by its name
            text = file.read_text(encoding="utf-8", errors="replace")
            what = looks_like_secret(text) or (
                "a secret of this environment" if redact(text, os.environ) != text else None
            )
            if what is not None:
                found.append(
                    InvalidInput(f"{file}: holds what looks like {what}; take it out of the base, then run again")
                )
    return found


def published(publication: Publication) -> Published:
    """The list of what a publication consists of."""
    texts = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in publication.texts.items()}
    files = dict(sorted((publication.hashes | texts).items()))
    return Published(pipeline=publication.name, identity=publication.release.identity, files=files)
