"""The commands on finished models: score one, talk to one, serve and add up adapters."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from flows.project import DEFAULT_SPEC, Root, SpecFile, root_of
from stages.errors import InvalidInput


def scan(
    model: Path,
    *,
    output: Path | None = None,
    top_percent: Annotated[float, Parameter(validator=validators.Number(gt=0, lte=100))] = 25.0,
    score: Literal["reference", "marchenko_pastur"] = "reference",
    embeddings: bool = False,
) -> None:
    """Score every weight matrix of a model by signal-to-noise ratio, as method spectrum does; no GPU, little memory.

    Args:
        model: Folder of a checkpoint with safetensors files.
        output: Where the table, lists for other trainers and a plot go; `spectrum/<model>` by default. A second scan
            into the same folder goes on from what is there.
        top_percent: Share of the matrices of each module type to select.
        score: What ranks: the published code's score, or one with the noise edge that theory gives.
        embeddings: Put the output head and the input embedding on the list to unfreeze, as the published code does.
    """
    from flows.scan import scan_model

    name = model.resolve().name
    scan_model(model, name, Path("spectrum") / name if output is None else output, top_percent, score, embeddings)


def publish(
    spec: SpecFile,
    *,
    to: Annotated[str, Parameter(help="A folder, or hub:OWNER/NAME.")],
    root: Root = None,
    private: bool = False,
    with_warnings: bool = False,
    dry_run: bool = False,
) -> None:
    """Give away the released model with its card, if every gate passed and every byte is as it was published.

    Args:
        spec: The spec file.
        to: A folder, new or with an earlier publication of the same pipeline; or hub:OWNER/NAME.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
        private: Make a new repository on the hub private.
        with_warnings: Publish in spite of gates that did not pass where the spec says `on_gate_failure: warn`.
        dry_run: Say what would go, and why it may not; nothing is written or sent.
    """
    from flows.publish.command import publish_release

    publish_release(spec, root_of(spec, root), to, private=private, with_warnings=with_warnings, dry_run=dry_run)


def chat(folder: Path, prompt: str | None = None, *, root: Root = None, max_tokens: int = 200) -> None:
    """Talk to a finished model.

    Args:
        folder: A project folder, a spec file, or the folder of a model or of an artifact.
        prompt: Ask this and leave; without it, a conversation until an empty line.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
        max_tokens: Longest answer.
    """
    from flows.engine import Run
    from stages.artifact import MANIFEST
    from stages.chat import converse
    from stages.log import quiet
    from stages.remote_code import allowing

    if (folder / "config.json").is_file() or (folder / MANIFEST).is_file():
        with quiet():
            converse(folder, prompt, max_tokens)
        return
    spec = folder / DEFAULT_SPEC if folder.is_dir() else folder
    if not spec.is_file():
        raise InvalidInput(f"{folder}: neither a model nor a project: no config.json, no {DEFAULT_SPEC}")
    plan = Run(spec, root_of(spec, root)).plan()
    last = plan.steps[-1]
    if last.artifact is None:
        raise InvalidInput(f"{spec}: no model is released yet; `trivium run {spec}` makes one")
    with quiet(), allowing(plan.pipeline.model.allow_remote_code):
        converse(last.artifact.loadable, prompt, max_tokens)


def adapters(artifacts: list[Path], *, prompts: Path | None = None, max_tokens: int = 200) -> None:
    """Serve the adapters of several stages from the one model that they started from.

    Without a file, a conversation: `/use NAME` lets another adapter answer, an empty line ends.

    Args:
        artifacts: Folders of published stages that started from the same model.
        prompts: JSON lines with `prompt` and `adapter` (a stage's name, or `base`); answers are printed as such lines.
        max_tokens: Longest answer.
    """
    from stages.chat import converse_with_adapters
    from stages.log import quiet

    with quiet():
        converse_with_adapters(artifacts, prompts, max_tokens)


def combine(
    artifacts: list[Path],
    *,
    to: Path,
    weight: list[float] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Add up what several SVF stages of one base learned, with weights, into one plain model.

    Args:
        artifacts: Folders of published stages with method svf (or svft, pattern plain) that started from one model.
        to: The folder to write; must not exist.
        weight: How much of each, in order; 1 each by default.
        dtype: Precision of the written weights.
    """
    from stages.combine import combine as add_up
    from stages.log import quiet

    with quiet():
        record = add_up(artifacts, [1.0] * len(artifacts) if weight is None else weight, to, dtype)
    for part in record["parts"]:
        print(f"{part['weight']:+g} x {part['artifact']}")  # noqa: T201
    print(f"model:  {to} (logits differ from the sum by {record['max_logit_error']:.1e} at most)")  # noqa: T201
