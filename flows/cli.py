"""The command line. Heavy imports stay inside the commands: help, validate and plan start fast."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, validators

from stages.errors import InvalidInput, TriviumError, TryAgain

if TYPE_CHECKING:
    from flows.engine import Run
    from flows.pipeline import Listener
    from specs.load import Problem
    from stages.plan import Plan

app = App(
    name="trivium",
    help="Adapt a causal language model to a domain from one spec file: CPT, IFT, alignment.",
    help_epilogue="Exit codes: 0 done, 2 invalid spec or usage, 3 a gate refused, 4 a stage failed, 75 try again.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # we have an exit code of our own for it
)

_unheard = False  # whether the Prefect server went away during the run
DEFAULT_SPEC = "spec.yaml"
"""The spec of a project folder."""
ARTIFACTS = "artifacts"
"""The folder of the artifacts, beside the spec."""
SpecFile = Annotated[Path, Parameter(help="The spec file.")]
Root = Annotated[Path | None, Parameter(help="Folder of the artifacts; `artifacts` beside the spec by default.")]
Place = Annotated[Path, Parameter(help="The folder of the artifacts, a project folder, or a spec.")]


def root_of(spec: Path, root: Path | None) -> Path:
    """Where the artifacts of a spec are."""
    # Not resolve(): it raises for a link that leads to itself, and the spec's own reader says so better.
    return Path(os.path.realpath(spec.parent / ARTIFACTS if root is None else root))


@app.command
def init(folder: Path, *, template: str = "quickstart") -> None:
    """Write a new project folder with a commented spec.

    Args:
        folder: Where to; must be empty or new, or an earlier run's of the same template.
        template: quickstart (a real model and its data), or a recipe's name.
    """
    from flows.templates import write

    for line in write(template, folder):
        print(line)  # noqa: T201


@app.command
def validate(spec: SpecFile) -> None:
    """Check a spec and every file it names; all errors at once, each by line and column."""
    from stages.advice import undecisive, warnings
    from stages.check import read_spec

    pipeline, document = read_spec(spec)
    _advise([*warnings(pipeline, document), *undecisive(pipeline, document)])
    stages = ", ".join(f"{stage.name} ({stage.kind}, {stage.method.kind})" for stage in pipeline.stages)
    print(f"{spec}: valid; {len(pipeline.stages)} stages: {stages}")  # noqa: T201


@app.command
def plan(spec: SpecFile, *, root: Root = None) -> None:
    """Say which steps would run, and why; which are kept; how many parameters each stage trains."""
    from flows.engine import Run

    _explain(Run(spec, root_of(spec, root)))


def _explain(asked: "Run", *, starting: bool = False) -> "Plan":
    """Check a spec, print its plan and what is advised against, and return the plan.

    Args:
        asked: what is to be planned.
        starting: the plan is about to be run: with ``--from``, without the seconds that it takes to count trainable
            parameters that are not known yet, and only if the disk has room for it.
    """
    from flows.terminal import print_plan
    from stages.advice import warnings
    from stages.check import check_counts, read_spec
    from stages.count import base_folder, stage_counts, stage_lines
    from stages.disk import estimate, refuse_if_full

    pipeline, document = read_spec(asked.spec, to_run=True)
    found = asked.plan(forced=starting)
    counts = stage_counts(found, compute=not starting)
    check_counts(found, counts, document)
    print_plan(found, stage_lines(found, counts), estimate(found, counts))
    if starting:
        refuse_if_full(found, counts)
    _advise(warnings(pipeline, document, base_folder(found)))
    return found


def _advise(found: "Sequence[Problem]") -> None:
    if found:
        from flows.terminal import print_warnings

        print_warnings(found)


@app.command
def run(
    spec: SpecFile,
    *,
    root: Root = None,
    from_stage: Annotated[str | None, Parameter(name="--from")] = None,
    until_stage: Annotated[str | None, Parameter(name="--until")] = None,
    prefect: bool = True,
) -> None:
    """Bring every stage up to date: published ones are kept, stale and missing ones run.

    Args:
        spec: The spec file.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
        from_stage: Run this stage and all after it, published or not.
        until_stage: Leave out the stages after this one, and the release.
        prefect: Show the run in Prefect; without it the same work is done and nothing is recorded there.
    """
    from flows.engine import Plain, Run, nothing_to_do, run_chain
    from flows.summary import summarise
    from flows.terminal import Watcher, print_summary

    asked = Run(spec.absolute(), root_of(spec, root), from_stage, until_stage)
    plan = _explain(asked, starting=True)
    try:
        if nothing_to_do(asked, plan):
            print("Nothing changed: every step is published and every gate passes.")  # noqa: T201
        else:
            with Watcher() as listen:
                if prefect:
                    _with_prefect(asked, plan, listen)
                else:
                    run_chain(asked, Plain(listen))
    finally:
        summary = summarise(asked.plan(pipeline=plan.pipeline))
        print_summary(summary)
    if summary.release is not None:
        print(f"model:  {_described(summary.release)}")  # noqa: T201
        print(f"chat:   trivium chat {spec.parent if spec.name == DEFAULT_SPEC else spec}")  # noqa: T201


def _described(release: Path) -> str:
    """The released model's folder; what a plain loader would get wrong is said beside it."""
    plain = (release / "config.json").is_file()
    return str(release) if plain else f"{release} (base + adapter: stages.serving.load reads it, see docs/adapters.md)"


def _with_prefect(asked: "Run", plan: "Plan", listen: "Listener") -> None:
    global _unheard  # noqa: PLW0603 - how the process leaves
    from flows import process
    from flows.server import embed_server, use_project_server

    for place in ("HANDLERS_CONSOLE", "INTERNAL"):  # the terminal has its own lines; the UI keeps Prefect's
        os.environ.setdefault(f"PREFECT_LOGGING_{place}_LEVEL", "CRITICAL")
    logging.raiseExceptions = False  # each batch of lines that a lost server does not take; we say it once
    try:
        if plan.pending:
            # The first step imports while Prefect does, and while its server starts.
            process.warm(plan.job(plan.pending[0]).kind, offline=plan.pipeline.is_offline)
        ready = None if use_project_server(asked.root) else embed_server(asked.root)
        from flows.pipeline import run_with_prefect, server_answers

        if ready is not None:
            ready()
        try:
            _unheard = run_with_prefect(asked, listen)
        except BaseException:
            _unheard = not server_answers()
            raise
    finally:
        process.dismiss()


@app.command
def show(spec: SpecFile, *, root: Root = None) -> None:
    """Print the table of what is published: metrics per stage, verdicts, costs, the model's folder."""
    from flows.engine import Run
    from flows.summary import summarise
    from flows.terminal import print_summary

    print_summary(summary := summarise(Run(spec, root_of(spec, root)).plan()))
    print(f"model:  {_described(summary.release) if summary.release else 'not released yet'}")  # noqa: T201


@app.command
def verify(place: Place = Path(ARTIFACTS)) -> None:
    """Re-hash everything that is published; say what is damaged, what depends on it and what to do.

    Also measurements, verdicts, sealed checkpoints and the folders of bases. Ends with 4 if anything is damaged.
    """
    from flows.store import print_verified
    from stages.store import root_at

    print_verified(root_at(place, ARTIFACTS))


@app.command
def gc(place: Place = Path(ARTIFACTS), *, yes: bool = False) -> None:
    """Say what nothing refers to any more, and how much it is; remove it only with --yes.

    Kept: what the last run of each spec names, the newest artifact of each stage, the release, all that these were
    made from, and what a process works on.

    Args:
        place: The folder of the artifacts, a project folder, or a spec.
        yes: Remove what is listed.
    """
    from flows.store import print_garbage
    from stages.store import root_at

    print_garbage(root_at(place, ARTIFACTS), yes=yes)


@app.command
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from stages.pipeline import schema_text

    print(schema_text(), end="")  # noqa: T201


@app.command
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


@app.command
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


@app.command
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


@app.command
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


@app.command
def ui(
    project: Path = Path(),
    *,
    root: Annotated[Path | None, Parameter(help="Folder of the artifacts.")] = None,
    port: int = 4200,
    open_browser: Annotated[bool, Parameter(name="--browser")] = True,
) -> None:
    """Serve the Prefect UI of a project on this machine, with its past runs, until Ctrl-C.

    Args:
        project: The project folder or its spec.
        root: Folder of the artifacts; `artifacts` in the project by default.
        port: Port on loopback.
        open_browser: Open the page.
    """
    from flows.server import serve_ui

    folder = project if project.is_dir() else project.parent
    serve_ui((folder / ARTIFACTS if root is None else root).resolve(), port=port, open_browser=open_browser)


def main() -> None:
    """Run a command and leave with the exit code that `stages.errors` documents."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    code = _run(sys.argv[1:])
    if _unheard:  # Prefect would go on for minutes, once per event, to knock at the door of a server that is gone
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a command as Ctrl-C does: the stage saves a checkpoint and its processes are gone."""
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    from specs.load import SpecError

    try:
        app(arguments, exit_on_error=False, result_action="return_none")
    except CycloptsError:
        return InvalidInput.exit_code  # cyclopts has said what is wrong
    except SpecError as error:
        return _told(str(error), InvalidInput.exit_code)
    except KeyboardInterrupt:
        return _told("trivium: stopped; run again to go on", TryAgain.exit_code)
    except BrokenPipeError:
        return 0
    except (TriviumError, OSError) as error:
        from stages.faults import explain

        reason = explain(error)
        return _told(f"trivium: {reason}", reason.exit_code)
    return 0


def _told(line: str, exit_code: int) -> int:
    from specs.secrets import redact

    print(redact(line, os.environ), file=sys.stderr)  # noqa: T201
    return exit_code


if __name__ == "__main__":
    main()
