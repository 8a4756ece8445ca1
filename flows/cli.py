"""The command line. Heavy imports stay inside the commands: help, validate and plan start fast."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from stages.errors import InvalidInput, TriviumError, TryAgain

if TYPE_CHECKING:
    from flows.engine import Run
    from flows.pipeline import Listener
    from stages.plan import Plan

app = App(
    name="trivium",
    help="Adapt a causal language model to a domain from one spec file: CPT, IFT, alignment.",
    help_epilogue="Exit codes: 0 done, 2 invalid spec or usage, 3 a gate refused, 4 a stage failed, 75 try again.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # we have an exit code of our own for it
)

SpecFile = Annotated[Path, Parameter(help="The spec file.")]
Root = Annotated[Path | None, Parameter(help="Folder of the artifacts; `artifacts` beside the spec by default.")]


def root_of(spec: Path, root: Path | None) -> Path:
    """Where the artifacts of a spec are."""
    return (spec.parent / "artifacts" if root is None else root).resolve()


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
    from stages.check import check_spec
    from stages.pipeline import load_pipeline

    pipeline, document = load_pipeline(spec)
    check_spec(pipeline, document)
    stages = ", ".join(f"{stage.name} ({stage.kind}, {stage.method.kind})" for stage in pipeline.stages)
    print(f"{spec}: valid; {len(pipeline.stages)} stages: {stages}")  # noqa: T201


@app.command
def plan(spec: SpecFile, *, root: Root = None) -> None:
    """Say which steps would run, and why; which are kept."""
    from flows.engine import Run
    from flows.terminal import print_plan
    from stages.check import check_spec
    from stages.pipeline import load_pipeline

    check_spec(*load_pipeline(spec))
    print_plan(Run(spec, root_of(spec, root)).plan())


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
    from flows.engine import Plain, Run, run_chain
    from flows.summary import summarise
    from flows.terminal import Watcher, print_plan, print_summary
    from stages.check import check_spec
    from stages.pipeline import load_pipeline

    check_spec(*load_pipeline(spec))
    asked = Run(spec.resolve(), root_of(spec, root), from_stage, until_stage)
    plan = asked.plan(forced=True)
    print_plan(plan)
    try:
        if not plan.pending and all(verdict.passed for _, verdict in summarise(plan).verdicts):
            print("Nothing changed: every step is published and every gate passes.")  # noqa: T201
        else:
            with Watcher() as listen:
                if prefect:
                    _with_prefect(asked, plan, listen)
                else:
                    run_chain(asked, Plain(listen))
    finally:
        summary = summarise(asked.plan())
        print_summary(summary)
    if summary.release is not None:
        print(f"model:  {summary.release}")  # noqa: T201
        print(f"chat:   trivium chat {spec.parent}")  # noqa: T201


def _with_prefect(asked: "Run", plan: "Plan", listen: "Listener") -> None:
    from flows import process
    from flows.server import use_project_server

    # The terminal has its own lines; the UI keeps Prefect's.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR")
    try:
        if plan.pending:
            # The first step imports while Prefect does, and while its server starts.
            process.warm(plan.job(plan.pending[0]).kind)
        use_project_server(asked.root)
        from flows.pipeline import run_with_prefect

        run_with_prefect(asked, listen)
    finally:
        process.dismiss()


@app.command
def show(spec: SpecFile, *, root: Root = None) -> None:
    """Print the table of what is published: metrics per stage, verdicts, costs, the model's folder."""
    from flows.engine import Run
    from flows.summary import summarise
    from flows.terminal import print_summary

    summary = summarise(Run(spec, root_of(spec, root)).plan())
    print_summary(summary)
    print(f"model:  {summary.release or 'not released yet'}")  # noqa: T201


@app.command
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from stages.pipeline import schema_text

    print(schema_text(), end="")  # noqa: T201


@app.command
def chat(folder: Path, prompt: str | None = None, *, root: Root = None, max_tokens: int = 200) -> None:
    """Talk to a finished model.

    Args:
        folder: A project folder, a spec file or the folder of a model.
        prompt: Ask this and leave; without it, a conversation until an empty line.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
        max_tokens: Longest answer.
    """
    from flows.engine import Run
    from stages.chat import converse

    if (folder / "config.json").is_file():
        converse(folder, prompt, max_tokens)
        return
    spec = folder / "spec.yaml" if folder.is_dir() else folder
    if not spec.is_file():
        raise InvalidInput(f"{folder}: neither a model nor a project: no config.json, no spec.yaml")
    last = Run(spec, root_of(spec, root)).plan().steps[-1]
    if last.artifact is None:
        raise InvalidInput(f"{spec}: no model is released yet; `trivium run {spec}` makes one")
    converse(last.artifact.model, prompt, max_tokens)


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
    serve_ui((folder / "artifacts" if root is None else root).resolve(), port=port, open_browser=open_browser)


def main() -> None:
    """Run a command and leave with the exit code that `stages.errors` documents."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run(sys.argv[1:]))


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
        print(error, file=sys.stderr)  # noqa: T201
        return InvalidInput.exit_code
    except TriviumError as error:
        print(f"trivium: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print("trivium: stopped; run again to go on", file=sys.stderr)  # noqa: T201
        return TryAgain.exit_code
    except BrokenPipeError:
        return 0
    return 0


if __name__ == "__main__":
    main()
