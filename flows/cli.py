"""The command line. Heavy imports stay inside the commands: help, validate and plan start fast."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from flows.approval import approve, reject
from flows.diagnose import diagnose
from flows.model_commands import adapters, chat, combine, publish, scan
from flows.project import ARTIFACTS, DEFAULT_SPEC, Place, Root, SpecFile, root_of
from flows.report.command import report
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

_unheard = False  # whether the Prefect server was gone when the run ended

for command in (approve, reject, scan, chat, adapters, combine, diagnose, report, publish):
    app.command(command)


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


@app.command
def data(spec: SpecFile, *, stage: str | None = None, root: Root = None) -> None:
    """Print what each stage would train on, without training: masks, duplicates, overlap with what metrics measure on.

    Ends with 2 where a run would refuse the data.

    Args:
        spec: The spec file.
        stage: This stage only.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
    """
    from flows.data import print_data
    from flows.engine import Run

    print_data(Run(spec.absolute(), root_of(spec, root)), stage)


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
    room = estimate(found, counts)
    print_plan(found, stage_lines(found, counts), room)
    if starting:
        refuse_if_full(room)
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
    from stages.approval import questions

    asked = Run(spec.absolute(), root_of(spec, root), from_stage, until_stage)
    plan = _explain(asked, starting=True)
    try:
        if nothing_to_do(asked, plan):
            passes = " and every gate passes" if not questions(plan) else ", and every gate passes or a person approved"
            print(f"Nothing changed: every step is published{passes}.")  # noqa: T201
        else:
            with Watcher() as listen:
                if prefect:
                    _with_prefect(asked, plan, listen)
                else:
                    run_chain(asked, Plain(listen))
    finally:
        ended = asked.plan(pipeline=plan.pipeline)
        summary = summarise(ended)
        print_summary(summary)
        _report(ended, asked.spec)
    if summary.withheld:
        print(f"model:  {summary.withheld}")  # noqa: T201
    if summary.release is not None:
        print(f"model:  {_described(summary.release)}")  # noqa: T201
        print(f"chat:   trivium chat {spec.parent if spec.name == DEFAULT_SPEC else spec}")  # noqa: T201


def _report(plan: "Plan", spec: Path) -> None:
    """Write the run's report; what the run itself came to is never lost over it."""
    from flows.report.page import keep_report

    try:
        print(f"report: {keep_report(plan, spec)}")  # noqa: T201
    except Exception as error:  # a full disk, a document of another version
        print(f"trivium: the report was not written: {error}", file=sys.stderr)  # noqa: T201


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
            run_with_prefect(asked, listen)
        finally:
            _unheard = not server_answers()
    finally:
        process.dismiss()


@app.command
def show(spec: SpecFile, *, root: Root = None) -> None:
    """Print the table of what is published: metrics per stage, verdicts, costs, the model's folder."""
    from flows.engine import Run
    from flows.summary import summarise
    from flows.terminal import print_summary

    print_summary(summary := summarise(Run(spec, root_of(spec, root)).plan()))
    print(f"model:  {_described(summary.release) if summary.release else summary.withheld or 'not released yet'}")  # noqa: T201


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
