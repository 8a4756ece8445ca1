"""A publication on the Hugging Face hub: one commit that holds all of it, and a tag that names the release."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from pydantic import TypeAdapter, ValidationError

from flows.publish.publication import MANIFEST, Publication, Published, published
from specs.paths import HubId
from stages.documents import read_sealed, sealed_text
from stages.errors import InvalidInput, StageFailed, TryAgain

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
"""How a place on the hub is told from a folder."""
_HUBS_OWN = (".gitattributes",)
"""What the hub puts into a new repository by itself."""
_ID: TypeAdapter[str] = TypeAdapter(HubId)


def repository(place: str) -> str | None:
    """The id that `hub:OWNER/NAME` names; None where ``place`` is a folder.

    Raises:
        InvalidInput: it begins so and names none.
    """
    if not place.startswith(PREFIX):
        return None
    try:
        return _ID.validate_python(place.removeprefix(PREFIX))
    except ValidationError:
        raise InvalidInput(f"--to {place}: a place on the hub is {PREFIX}OWNER/NAME") from None


def require_access() -> None:
    """Look at what can be known before anything is sent.

    Raises:
        InvalidInput: the environment forbids the network, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise InvalidInput(
            "the environment forbids the network (HF_HUB_OFFLINE); unset it, or publish to a folder (--to FOLDER)"
        )
    if get_token() is None:
        raise InvalidInput("nobody is logged in to the hub: set HF_TOKEN to a token that may write, or `hf auth login`")


def to_hub(publication: Publication, repo: str, *, private: bool) -> str:
    """Put a publication on the hub in one commit and tag it; returns the commit's page.

    An earlier publication of the same pipeline is replaced: its files that the new one does not have are removed by the
    same commit; what others put there stays, and what they changed is in the history. The tag of a release that was
    published before stays where it was.

    Raises:
        InvalidInput: the repository holds something else, is public though ``private`` is asked for, or may not be
            written to.
        StageFailed: a file is not what the release's manifest says.
        TryAgain: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    require_access()
    api = HfApi()
    with _explained(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)  # else as the organisation has it
        if private and not api.repo_info(repo).private:
            raise InvalidInput(f"{PREFIX}{repo}: is public, and --private was asked for; change that on the hub first")
        present = [name for name in api.list_repo_files(repo) if name not in _HUBS_OWN]
        own = _own_files(api, repo, present, publication.name)
        operations: list[Any] = [CommitOperationAdd(name, str(file)) for name, file in publication.files.items()]
        for operation in operations:
            if operation.upload_info.sha256.hex() != publication.hashes[operation.path_in_repo]:
                raise StageFailed(f"{operation.path_or_fileobj}: changed since it was verified; nothing is published")
        texts = publication.texts | {MANIFEST: sealed_text(published(publication).model_dump())}
        operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
        kept = {operation.path_in_repo for operation in operations}
        operations += [CommitOperationDelete(name) for name in present if name in own - kept]
        done = api.create_commit(repo, operations, commit_message=f"{publication.name}: {publication.tag}")
        api.create_tag(repo, tag=publication.tag, revision=done.oid, exist_ok=True)
    return str(done.commit_url)


def _own_files(api: "HfApi", repo: str, present: list[str], name: str) -> set[str]:
    """The files of an earlier publication of the pipeline, which may be replaced; none in an empty repository."""
    if not present:
        return set()
    known = None
    if MANIFEST in present:
        with TemporaryDirectory() as folder:
            file = api.hf_hub_download(repo, MANIFEST, local_dir=folder)
            try:
                known = Published.model_validate(read_sealed(Path(file)), strict=True)
            except (InvalidInput, ValidationError):
                known = None
    if known is None or known.pipeline != name:
        found = "something else" if known is None else f"a publication of pipeline {known.pipeline!r}"
        raise InvalidInput(f"{PREFIX}{repo}: holds {found} already; name another repository")
    return {MANIFEST, *known.files}


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub or the network says, for people, with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    client_error = cast(
        "type[Exception]", HfHubHTTPError.__mro__[1]
    )  # of whichever HTTP client this version of the library uses

    place = f"{PREFIX}{repo}"
    try:
        yield
    except HFValidationError as error:
        raise InvalidInput(f"{place}: no id that the hub takes: {_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            raise InvalidInput(
                f"{place}: the hub refuses ({status}): {_line(error)}; check the name, and whether the token may write"
            ) from error
        if status == 429 or status >= 500:
            raise TryAgain(f"{place}: the hub answers with {status}: {_line(error)}; run again later") from error
        raise StageFailed(f"{place}: the hub refuses ({status}): {_line(error)}") from error
    except (client_error, LocalEntryNotFoundError, ConnectionError) as error:
        raise TryAgain(f"{place}: the hub cannot be reached ({_line(error)}); run again with the network") from error
    except RuntimeError as error:  # as the library wraps whatever breaks an upload off
        raise TryAgain(f"{place}: {_line(error)} ({_line(error.__cause__ or error)}); run again") from error
    except ValueError as error:  # the hub's own check of the card's settings
        raise StageFailed(f"{place}: the hub does not take the card: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
