"""Where a base model comes from and under which licence, as far as it says so itself: for the model card.

Nothing here can change a result, so none of it is part of an identity.
"""

import re
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from specs.model import ModelSpec
from specs.paths import HubId, License

CARD = "README.md"
"""The model card of a checkpoint, here and on the hub."""
_LARGEST_CARD = 1 << 20
"""Bytes of a card that are read: the block that matters stands at its beginning."""
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HUB_PAGE = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")
_ID: TypeAdapter[str] = TypeAdapter(HubId)
_LICENSE: TypeAdapter[str] = TypeAdapter(License)


@dataclass(frozen=True, slots=True)
class Origin:
    """What is known of a base model; None where it is not."""

    hub: str | None = None
    """Its id on the hub. The name in a config is not believed: a relative path looks the same."""
    license: str | None = None
    """As the hub spells it: apache-2.0, llama3.1, other."""
    license_name: str | None = None
    """What a licence is called that the hub does not know."""
    license_link: str | None = None
    said_by: str | None = None
    """Where the licence stands, in words."""

    def as_record(self) -> dict[str, str]:
        """For manifests: what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def origin_of(spec: ModelSpec, folder: Path, card: Path | None = None) -> Origin:
    """What a base says of itself, and a spec of it; the spec's word counts more. Files are read, nothing is fetched.

    Args:
        spec: the part of the spec.
        folder: the spec's.
        card: the base's model card, where it lies elsewhere than in ``spec.path``.
    """
    found = Origin()
    if spec.gguf is not None:
        found = _of_gguf(folder / spec.gguf)
    elif spec.path is not None or card is not None:
        found = _of_card(card if card is not None else folder / str(spec.path) / CARD) or found
    return with_word_of(spec, replace(found, hub=spec.hub or found.hub))


def with_word_of(spec: ModelSpec, found: Origin) -> Origin:
    """What is known of a base, with what a spec says of it, which counts more."""
    hub = spec.origin or found.hub
    if spec.license is not None:
        return Origin(hub=hub, license=spec.license, said_by="the spec")
    return replace(found, hub=hub)


def _of_card(card: Path) -> Origin | None:
    """What stands in the block of settings at the beginning of a model card."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not card.is_file():
        return None
    try:
        with card.open("rb") as stream:
            block = _FRONT.match(stream.read(_LARGEST_CARD).decode("utf-8", "replace"))
        said = YAML(typ="safe").load(block[1]) if block else None
    except (OSError, YAMLError, ValueError, LookupError, RecursionError):  # LookupError: !!bool maybe
        return None
    return None if not isinstance(said, dict) else _stated(said, "license", "its model card")


def _stated(said: dict[str, Any], key: str, where: str, hub: object = None) -> Origin:
    licensed = _valid(_LICENSE, said.get(key))
    name, link = (_line(said.get(f"{key}_{part}")) for part in ("name", "link"))
    return Origin(_valid(_ID, hub), licensed, name, link, where if licensed else None)


def _of_gguf(file: Path) -> Origin:
    """What stands in the settings of a GGUF file (ggml/docs/gguf.md, general metadata)."""
    from gguf import GGUFReader

    said: dict[str, Any] = {}
    with suppress(OSError, ValueError, IndexError, KeyError):  # what is no such file is refused elsewhere
        reader = GGUFReader(file)
        for name, field in reader.fields.items():
            if name.startswith("general."):
                said[name] = field.contents()
    said["general.license_name"] = said.get("general.license.name")
    said["general.license_link"] = said.get("general.license.link")
    page = said.get("general.source.huggingface.repository") or said.get("general.base_model.0.repo_url")
    matched = _HUB_PAGE.fullmatch(page) if isinstance(page, str) else None
    return _stated(said, "general.license", "the GGUF file", matched[1] if matched else page)


def _valid(kind: TypeAdapter[str], value: object) -> str | None:
    try:
        return kind.validate_python(value.lower() if kind is _LICENSE and isinstance(value, str) else value)
    except ValidationError:
        return None


def _line(value: object) -> str | None:
    return value.strip()[:200] or None if isinstance(value, str) and "\n" not in value.strip() else None
