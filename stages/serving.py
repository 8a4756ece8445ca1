"""Load what a stage published with one call, and serve several stages' adapters from one base.

`load(folder)` gives model and tokenizer of any artifact or model folder. `with_adapters(folders)` loads the start
model that several artifacts have in common once, and puts the adapter of each beside it. An adapter is served
only if the base with it on gives the logits that its artifact recorded, so what is served is what was published.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from stages import probe
from stages.adapter import CONFIG, adapter_settings, attach, load_beside
from stages.artifact import ADAPTER, Artifact, find, read, short, verified
from stages.errors import InvalidInput
from stages.methods import Method
from stages.methods.base import MethodSpec
from stages.model import load_plain, load_tokenizer, set_stop_tokens, training_device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PUBLISHED_BASE = "base"
"""The folder of the plain checkpoint in a published adapter, whose own files stand above it."""
BASE = "base"
"""The name under which the start model itself answers."""
_METHOD: TypeAdapter[MethodSpec] = TypeAdapter(Method)
_MIXABLE = ("LORA", "GLORA")
"""PEFT's kinds of adapters whose mixed batches equal one row at a time; VeRA's run, and are off by 1e-2 in logits."""
_PROMPT_LEARNING = ("PREFIX_TUNING", "PROMPT_TUNING")


def load(
    folder: Path | str, dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """The model of an artifact, a release or a plain model folder, ready to generate, and its tokenizer.

    Args:
        folder: an artifact (the folder with ``manifest.json``), a plain checkpoint (with ``config.json``), or what
            ``trivium publish`` makes of base + adapter (with ``adapter_config.json``, and the base below).
        dtype: of the weights; by default as they are kept.
        device: where the model goes.

    Returns:
        A transformers model, or a PEFT model of the same interface where the stage's method cannot be merged.

    Raises:
        InvalidInput: the folder is neither.
        StageFailed: the artifact was damaged, or the base of its adapter is missing or was changed.
    """
    place = Path(folder)
    if (place / "config.json").is_file():
        return assemble(place, None, dtype, device)
    if (place / CONFIG).is_file() and (place / PUBLISHED_BASE).is_dir():
        return assemble(place / PUBLISHED_BASE, place, dtype, device)
    artifact = read(place)
    if artifact is None:
        raise InvalidInput(f"{place}: no config.json, so no model, and no whole manifest.json, so no artifact")
    return assemble(verified(artifact).model, artifact.adapter, dtype, device)


def assemble(
    model: Path, adapter: Path | None, dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """A plain checkpoint, with an adapter on it where there is one, in eval mode, and its tokenizer.

    Args:
        model: the plain checkpoint.
        adapter: the adapter that belongs on it.
        dtype: of the weights, the adapter's included; by default the checkpoint's.
        device: where the model goes.
    """
    tokenizer = load_tokenizer(model)
    plain = load_plain(model, "auto" if dtype is None else dtype, device)  # type: ignore[arg-type]
    if adapter is not None:
        set_stop_tokens(plain, tokenizer)
    return put_on(plain, adapter), tokenizer


def put_on(plain: Any, adapter: Path | None) -> Any:
    """A loaded model, changed by the adapter that belongs on it where there is one, in its precision and eval mode."""
    return plain.eval() if adapter is None else attach(plain, adapter).to(dtype=plain.dtype).eval()


@dataclass(frozen=True, slots=True)
class Kept:
    """An artifact with the adapter that its stage trained."""

    name: str
    artifact: Artifact
    method: MethodSpec
    start: Artifact
    """What the stage started from."""
    settings: dict[str, Any]
    """The adapter's, as PEFT wrote them."""

    @property
    def inside(self) -> str:
        """What PEFT calls it: never a part of its own prefixes or of a module's name, which it would confuse."""
        return f"stage-{self.name}"

    @property
    def weights_dtype(self) -> str:
        """The precision in which the stage held the weights beneath the adapter."""
        held = self.artifact.manifest["inputs"]["stage"]["train"]["weights_dtype"]
        return str(held) if self.method.narrows else "float32"

    @property
    def type(self) -> str:
        """PEFT's name of the adapter's kind."""
        return str(self.settings.get("peft_type"))

    @property
    def unmixable(self) -> str | None:
        """Why the adapter cannot share a batch with others; None where it can, exactly."""
        if self.settings.get("use_dora"):
            return "DoRA rescales the base's own output, for all rows of a batch alike"
        if self.settings.get("modules_to_save"):
            return "it replaces whole modules of the base"
        if self.type in _MIXABLE:
            return None
        return f"PEFT does not keep adapters of method {self.method.kind} apart within a batch"


class AdapterSet:
    """One base and the adapters of several artifacts. `with_adapters` makes it."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", kept: Sequence[Kept]) -> None:
        """Take a PEFT model that holds the adapters by their names."""
        self.model, self.tokenizer = model, tokenizer
        self.kept = {one.name: one for one in kept}
        self._active = next(iter(self.kept))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they were given."""
        return tuple(self.kept)

    @property
    def active(self) -> str:
        """What answers where a call names nothing: an adapter, or `base`."""
        return self._active

    @property
    def unmixable(self) -> str | None:
        """Why the adapters cannot share a batch; None where they can, exactly."""
        found = ((one, one.unmixable) for one in self.kept.values())
        return next((f"{one.name} ({one.method.kind}): {reason}" for one, reason in found if reason), None)

    def switch(self, name: str) -> None:
        """Let an adapter answer from now on, or the base itself.

        Raises:
            InvalidInput: there is none of that name.
        """
        self._known([name])
        self._active = name
        if name != BASE:
            self.model.set_adapter(self.kept[name].inside)

    def logits(self, ids: "torch.Tensor", adapters: Sequence[str] | None = None) -> "torch.Tensor":
        """The logits of token ids (rows, length), unpadded, each row by its adapter: (rows, length, vocabulary).

        Args:
            ids: token ids.
            adapters: one name per row, or `base`; by default the active one for all.

        Raises:
            InvalidInput: an unknown name, or adapters that cannot share a batch.
        """
        return self._run(self.model, ids.shape[0], adapters, input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    def generate(
        self, prompts: Sequence[str], adapters: Sequence[str] | None = None, max_tokens: int = 200
    ) -> list[str]:
        """Greedy answers, all in one batch, each by its adapter.

        Args:
            prompts: a user's turn each; plain text where the tokenizer has no chat template.
            adapters: one name per prompt, or `base`; by default the active one for all.
            max_tokens: of the longest answer.

        Raises:
            InvalidInput: an unknown name, or adapters that cannot share a batch.
        """
        names = self._names(len(prompts), adapters)
        if len({one.type for one in self.kept.values()} & set(_PROMPT_LEARNING)) and len(prompts) > 1:
            # Padding would stand between the virtual tokens and the text.
            self._mixable(names)
            return [self.generate([one], names[:1], max_tokens)[0] for one in prompts]
        encoded = self._encode(prompts)
        found = self._run(
            self.model.generate, len(prompts), names, **encoded, max_new_tokens=max_tokens, do_sample=False
        )
        answers = found[:, encoded["input_ids"].shape[1] :]
        return [str(text) for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    def _encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        tokenizer: Any = self.tokenizer
        texts = list(prompts)
        if tokenizer.chat_template:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            texts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in turns]
        special = not tokenizer.chat_template  # a template writes them itself
        found = tokenizer(texts, add_special_tokens=special, padding=True, padding_side="left", return_tensors="pt")
        device = next(self.model.parameters()).device
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}

    def _run(self, call: Any, rows: int, adapters: Sequence[str] | None, **inputs: Any) -> Any:
        """Call the model with the adapters of each row."""
        import torch

        names = self._names(rows, adapters)
        self._mixable(names)
        before = self._active
        with torch.no_grad():
            if len(set(names)) > 1:
                own = ["__base__" if name == BASE else self.kept[name].inside for name in names]
                return call(**inputs, adapter_names=own)
            self.switch(names[0])
            try:
                if names[0] != BASE:
                    return call(**inputs)
                with self.model.disable_adapter():
                    return call(**inputs)
            finally:
                self.switch(before)

    def _names(self, rows: int, adapters: Sequence[str] | None) -> list[str]:
        names = [self._active] * rows if adapters is None else list(adapters)
        if len(names) != rows:
            raise InvalidInput(f"{rows} prompts and {len(names)} adapters: name one for each prompt")
        self._known(names)
        return names

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name != BASE and name not in self.kept:
                raise InvalidInput(f"no adapter {name!r}; there are: {', '.join((*self.names, BASE))}")

    def _mixable(self, names: Sequence[str]) -> None:
        if len(set(names)) > 1 and self.unmixable:
            raise InvalidInput(
                f"these adapters cannot share a batch: {self.unmixable}. Ask one adapter at a time: that is exact"
            )


def with_adapters(folders: Sequence[Path | str], device: str | None = None) -> AdapterSet:
    """Load the start model of several artifacts once, with the adapters of all of them beside it.

    Args:
        folders: artifacts of stages that started from the same model, of methods with a PEFT adapter.
        device: where the model goes; by default where stages train.

    Raises:
        InvalidInput: they cannot be served from one base; the message names which and why.
        StageFailed: an artifact was damaged.
    """
    import torch

    kept = _named([_kept(Path(folder)) for folder in folders])
    if not kept:
        raise InvalidInput("name at least one artifact")
    for other in kept[1:]:
        _check_pair(kept[0], other)
    first = kept[0]
    tokenizer = load_tokenizer(first.artifact.model)
    base = first.method.load_beneath(first.start.model, getattr(torch, first.weights_dtype))
    set_stop_tokens(base, tokenizer)
    model = attach(base, first.artifact.path / ADAPTER, first.inside)
    for other in kept[1:]:
        try:
            load_beside(model, other.artifact.path / ADAPTER, other.inside)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidInput(
                f"PEFT cannot hold {other.name} beside {first.name}; serve them apart: {reason}"
            ) from error
    served = AdapterSet(model.eval(), tokenizer, kept)
    for one in kept:
        _check_served(served, one)
    model.to(training_device() if device is None else device)
    return served


def method_of(artifact: Artifact) -> MethodSpec:
    """The method of a published stage, as its manifest names it.

    Raises:
        InvalidInput: it was one of another version.
    """
    fields = artifact.manifest["inputs"]["stage"]["method"]
    try:
        return _METHOD.validate_python(fields, strict=False)
    except ValidationError as error:
        raise InvalidInput(
            f"{artifact.path}: was made by another version of method {fields['kind']}: {error}"
        ) from error


def _kept(folder: Path) -> Kept:
    artifact = read(folder)
    if artifact is None:
        raise InvalidInput(f"{folder}: not an artifact: no manifest.json that is whole")
    inputs, record = artifact.manifest["inputs"], artifact.manifest["record"]
    if inputs.get("kind") != "stage":
        raise InvalidInput(f"{folder}: {inputs.get('kind')} trained no adapter; name the folder of a stage")
    kind = inputs["stage"]["method"]["kind"]
    if not (artifact.path / ADAPTER).is_dir():
        raise InvalidInput(f"{folder}: method {kind} keeps no adapter; serve the model in {artifact.model}")
    method = method_of(artifact)
    start = find(artifact.path.parent, inputs["parent"])
    if start is None:
        raise InvalidInput(
            f"{folder}: the artifact that it started from ({short(inputs['parent'])}) is not in "
            f"{artifact.path.parent}; run `trivium run` on the spec"
        )
    if not method.kept_for_start or method.config_changes:
        raise InvalidInput(
            f"{folder}: method {kind} changed the model beneath its adapter, which no other could share; serve the "
            f"merged model in {artifact.model}"
        )
    settings = adapter_settings(artifact.path / ADAPTER)
    return Kept(str(record["stage"]), verified(artifact), method, start, settings)


def _named(kept: list[Kept]) -> list[Kept]:
    """The same, with the folder's name in place of a stage's that is there twice."""
    names = [one.name for one in kept]
    found = [
        one
        if names.count(one.name) == 1 and one.name != BASE
        else Kept(one.artifact.path.name, one.artifact, one.method, one.start, one.settings)
        for one in kept
    ]
    paths = [one.artifact.path.resolve() for one in kept]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise InvalidInput(f"{path}: named twice")
        if found[number].name in [one.name for one in found[:number]]:
            raise InvalidInput(f"{path}: another artifact has the same folder name; copy one of them elsewhere")
    return found


def _check_pair(first: Kept, other: Kept) -> None:
    if first.start.identity != other.start.identity:
        raise InvalidInput(
            f"{first.name} started from {first.start.path.name} and {other.name} from {other.start.path.name}: "
            "adapters share a base only if their stages started from the same model"
        )
    if (first.method.beneath, first.weights_dtype) != (other.method.beneath, other.weights_dtype):
        raise InvalidInput(
            f"{first.name} was trained over {_spelt(first)} and {other.name} over {_spelt(other)}: these are different "
            "bases"
        )
    if first.type != other.type:
        raise InvalidInput(
            f"{first.name} is an adapter of method {first.method.kind} and {other.name} of {other.method.kind}: PEFT "
            "cannot hold these kinds side by side; serve them apart"
        )


def _spelt(kept: Kept) -> str:
    """What lies beneath an adapter, for people."""
    found = ", ".join(f"{name} {value}" for name, value in kept.method.beneath.items())
    if found:
        return f"weights of {found}"
    own = "the start's own weights"
    return own if kept.weights_dtype == "float32" else f"{own} in {kept.weights_dtype}"


def _check_served(served: AdapterSet, one: Kept) -> None:
    """The base with the adapter on must answer as the artifact recorded."""
    import torch
    from safetensors.torch import load_file

    recorded = load_file(one.artifact.path / probe.FILE)
    found = served.logits(recorded["ids"], [one.name] * recorded["ids"].shape[0])[:, -1].to(torch.float64)
    wanted = recorded["logits"]
    noise = probe.FLOAT32_NOISE * float(wanted.abs().max())
    difference = float((found - wanted).abs().max())
    if not difference <= probe.TOLERANCE + noise:
        raise InvalidInput(
            f"{one.name}: the base with its adapter on is not what was published (logits differ by {difference:.2g}): "
            f"method {one.method.kind} cannot be served so; serve the model in {one.artifact.model}"
        )
