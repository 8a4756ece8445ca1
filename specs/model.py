"""Where the base model comes from."""

from typing import Annotated, Literal

from pydantic import StringConstraints, model_validator

from specs.base import Spec

HubId = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*/\w[\w.-]*$")]
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
FilePath = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
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

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "ModelSpec":
        named = [name for name in ("path", "gguf", "hub") if getattr(self, name) is not None]
        if len(named) != 1:
            found = " and ".join(named) or "none of them"
            raise ValueError(f"a model is one of path, gguf or hub; found {found}")
        if (self.hub is None) != (self.revision is None):
            raise ValueError("hub and revision go together: the revision is the commit, 40 hex digits")
        return self
