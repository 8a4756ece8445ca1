"""`trivium report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from flows.project import Root, SpecFile, root_of


def report(
    spec: SpecFile,
    *,
    root: Root = None,
    output: Path | None = None,
    open_browser: Annotated[bool, Parameter(name="--browser", negative=())] = False,
) -> None:
    """Write the report of a chain as one HTML page: gates, learning against forgetting, curves, data, samples, cost.

    It is made from what is published, needs no network and no server, and is also written at the end of every run.

    Args:
        spec: The spec file.
        root: Folder of the artifacts; `artifacts` beside the spec by default.
        output: The HTML file to write; `report.html` beside the artifacts by default.
        open_browser: Open the page.
    """
    import webbrowser

    from flows.engine import Run
    from flows.report.page import write_report
    from stages.errors import InvalidInput

    if output is not None and output.is_dir():
        raise InvalidInput(
            f"--output {str(output)!r} is a folder: name the file in it, such as {output / 'report.html'}"
        )
    place = write_report(Run(spec, root_of(spec, root)).plan(), spec, output).absolute()
    print(f"report: {place}")  # noqa: T201
    if open_browser:
        webbrowser.open(place.as_uri())
