"""What `trivium verify` and `trivium gc` print. What they do is in `stages.verify` and `stages.garbage`."""

from collections.abc import Iterable
from pathlib import Path

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flows.terminal import err, out
from stages.artifact import JOBS, LOCKS
from stages.errors import StageFailed
from stages.garbage import Garbage, Item, find_garbage, remove
from stages.store import size_of
from stages.verify import Finding, Report, verify, weigh

_FILES_SHOWN = 10


def print_verified(root: Path) -> None:
    """Re-hash everything below ``root`` and say what is damaged, what depends on it and what to do.

    Raises:
        StageFailed: something is damaged.
    """
    with Progress(
        TextColumn("hashing"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ) as progress:
        task = progress.add_task("", total=weigh(root))
        report = verify(root, lambda size: progress.advance(task, size))
    for finding in report.findings:
        _print_finding(finding, root)
    _line(f"looked at {_counted(report)}: {decimal(report.bytes)} below {root}")
    if report.findings:
        raise StageFailed(f"{_number(len(report.findings), 'thing')} damaged; what to do is said above")
    _line("all is as it was recorded")


def print_garbage(root: Path, *, yes: bool) -> None:
    """Say what nothing refers to and how much it is; remove it if ``yes``.

    Raises:
        StageFailed: something that was to go is still there.
    """
    garbage = find_garbage(root)
    sizes = {item.path: size_of(item.path) for item in garbage.items}
    _print_garbage(garbage, sizes, root)
    if not garbage.items:
        _line("nothing to remove")
    elif not yes:
        _line(f"{_total(garbage.items, sizes)} can go; nothing was removed: `trivium gc {root} --yes` removes it")
    else:
        gone, stayed = remove(root, garbage.items)
        _line(f"removed {_total(gone, sizes)}")
        if stayed:
            raise StageFailed("not removed: " + "; ".join(stayed))


def _print_finding(finding: Finding, root: Path) -> None:
    out.print("[red]damaged[/] ", end="")
    _line(_below(finding.path, root))
    more = len(finding.what) - _FILES_SHOWN
    for line in [*finding.what[:_FILES_SHOWN], *([f"and {more} more"] if more > 0 else [])]:
        _line(f"        {line}")
    if finding.depends:
        _line(f"        depends on it: {', '.join(finding.depends)}")
    _line(f"        to do: {finding.remedy}")


def _print_garbage(garbage: Garbage, sizes: dict[Path, int], root: Path) -> None:
    small: dict[tuple[Path, str], list[Path]] = {}
    for item in garbage.items:
        if item.path.parent.name in {JOBS, LOCKS}:
            small.setdefault((item.path.parent, item.why), []).append(item.path)
        else:
            _line(f"{decimal(sizes[item.path]):>9}  {_below(item.path, root)}: {item.why}")
    for (folder, why), files in small.items():
        size = decimal(sum(sizes[file] for file in files))
        _line(f"{size:>9}  {_below(folder, root)}: {_number(len(files), 'file')}: {why}")
    for line in garbage.left:
        _line(f"     left  {line}")


def _total(items: Iterable[Item], sizes: dict[Path, int]) -> str:
    paths = [item.path for item in items]
    return f"{_number(len(paths), 'item')}, {decimal(sum(sizes[path] for path in paths))}"


def _counted(report: Report) -> str:
    parts = {
        "artifact": report.artifacts,
        "measurement": report.evaluations,
        "verdict": report.verdicts,
        "decision": report.decisions,
        "checkpoint": report.checkpoints,
        "base elsewhere": report.bases,
    }
    return ", ".join(_number(count, noun) for noun, count in parts.items() if count) or "nothing"


def _number(count: int, noun: str) -> str:
    plural = "bases elsewhere" if noun.startswith("base") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _line(text: str) -> None:
    out.print(text.encode("utf-8", "backslashreplace").decode(), markup=False, soft_wrap=True)
