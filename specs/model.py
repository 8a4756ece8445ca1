"""Where the base model comes from."""

from datetime import date
from typing import Literal

from pydantic import model_validator

from specs.base import Spec, later_addition, name_only
from specs.paths import Commit, FilePath, HubId, License, Sha256

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelSpec(Spec):
    """The base model: exactly one of a folder, a GGUF file or a hub id with its revision."""

    path: FilePath | None = None
    """Folder of a transformers checkpoint (safetensors, config, tokenizer), relative to the spec."""
    gguf: FilePath | None = None
    """A GGUF file, relative to the spec; it is dequantised once into a plain checkpoint."""
    hub: HubId | None = None
    """Id of a model on the Hugging Face hub, together with `revision`."""
    revision: Commit | None = None
    """The commit of the hub model, 40 hex digits: a branch name may mean other weights tomorrow."""
    dtype: Dtype = "bfloat16"
    """The precision of the released model and of every evaluation. Hand-overs between stages are float32."""
    chat_template: FilePath | None = None
    """A Jinja file, relative to the spec, for a tokenizer that has no chat template or an unfit one."""
    template_date: date | None = later_addition(None)
    """The day, YYYY-MM-DD, that a chat template which asks for today's date (`strftime_now`) is given, in training and
    in evaluation: without it such a template is refused, since each day would train on another text."""
    allow_remote_code: Sha256 | None = later_addition(None)
    """The sha256, 64 hex digits, of the Python files that come with the model, to let just those files run. By
    default no such code runs, and the message that refuses it names the digest. Read the code first: it may do
    whatever you may do."""
    license: License | None = name_only(None)
    """The base's licence as the hub spells it, for the model card: `apache-2.0`, `llama3.1`, `other`. By default what
    the base itself says, in its model card or its GGUF file."""
    origin: HubId | None = name_only(None)
    """With `path` or `gguf`: the id on the hub of the model that this is a copy of, for the model card."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "ModelSpec":
        named = [name for name in ("path", "gguf", "hub") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none of them"
            raise ValueError(f"a model is one of path, gguf or hub; found {found}")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("hub and revision go together: the revision is the commit, 40 hex digits")
        if self.hub is not None and self.origin is not None:
            raise ValueError("origin goes with path or gguf: with hub, that id is the origin; remove origin")
        if self.gguf is not None and self.allow_remote_code is not None:
            raise ValueError("allow_remote_code goes with path or hub: a GGUF file brings no code; remove it")
        return self
