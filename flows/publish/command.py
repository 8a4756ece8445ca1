"""What `trivium publish` does and prints."""

from pathlib import Path

from rich.filesize import decimal

from flows.engine import Run
from flows.model_card import keep_card
from flows.publish.folder import check_folder, to_folder
from flows.publish.hub import repository, require_access, to_hub
from flows.publish.publication import MANIFEST, Publication, gather
from flows.terminal import out
from stages.errors import InvalidInput, TriviumError


def publish_release(spec: Path, root: Path, to: str, *, private: bool, with_warnings: bool, dry_run: bool) -> None:
    """Publish the release of a spec, or say what would go and why it may not.

    Raises:
        InvalidInput: it is not finished, or cannot go there.
        GateRefused: a gate did not pass.
        StageFailed: the release was damaged.
        TryAgain: the hub cannot be reached, or another process publishes.
    """
    repo = repository(to)
    if private and repo is None:
        raise InvalidInput("--private goes with a place on the hub (--to hub:OWNER/NAME)")
    publication, against = gather(Run(spec, root), with_warnings=with_warnings)
    against += _no_place(publication, to, repo)
    if dry_run:
        _tell(publication, against, to)
    if against:
        raise _together(against)
    if dry_run or publication is None:
        return
    keep_card(publication.plan, spec)
    if repo is not None:
        _line(f"published: {to_hub(publication, repo, private=private)}, tag {publication.tag}")
    elif to_folder(publication, Path(to)):
        _line(f"published: {to}")
    else:
        _line(f"{to}: holds this release already, with this card")


def _no_place(publication: Publication | None, to: str, repo: str | None) -> list[TriviumError]:
    """Why it cannot go there, as far as that can be known before anything is written or sent."""
    try:
        if repo is not None:
            require_access()
        elif publication is not None:
            check_folder(publication, Path(to))
    except InvalidInput as error:
        return [error]
    return []


def _together(against: list[TriviumError]) -> TriviumError:
    """All reasons in one, of the kind of the first."""
    return type(against[0])("not published: " + "\n".join(str(error) for error in against))


def _tell(publication: Publication | None, against: list[TriviumError], to: str) -> None:
    if publication is None:
        _line("there is no release to publish yet")
        return
    for name, file in publication.files.items():
        _line(f"{decimal(file.stat().st_size) if file.is_file() else 'missing':>9}  {name}")
    for name, text in publication.texts.items():
        _line(f"{decimal(len(text.encode())):>9}  {name}")
    _line(f"{'':>9}  {MANIFEST}")
    _line(f"{'may not go' if against else 'would go'} to {to} as {publication.tag} of {publication.name}")


def _line(text: str) -> None:
    out.print(text, markup=False, soft_wrap=True)
