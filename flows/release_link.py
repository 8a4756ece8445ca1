"""The store's link `model`: the path of the released model, which stays the same from run to run."""

from pathlib import Path

from stages.artifact import MODEL, read
from stages.plan import RELEASE, Plan


def point_to_release(plan: Plan) -> None:
    """Let the store's link name the release of ``plan``: another spec's run, or an edit, may have moved it."""
    released = read(plan.steps[-1].place) if plan.steps[-1].name == RELEASE else None
    link = plan.store / MODEL
    if released is not None and not (link.is_symlink() and link.parent / link.readlink() == released.loadable):
        point_to(released.loadable, link)


def withdraw(plan: Plan) -> str:
    """Take the store's link off a release that its gates refuse by now; says so. One to another release stays."""
    link, released = plan.store / MODEL, read(plan.steps[-1].place)
    if released is None or not link.is_symlink() or link.parent / link.readlink() != released.loadable:
        return ""
    link.unlink()
    return f". {link} led to it, since before the gates were stricter, and was removed"


def point_to(model: Path, link: Path) -> None:
    """Let ``link`` name the released model, so that its path stays the same from run to run.

    Where the release is base + adapter, that is the folder of both: the base alone would load, and be another model.
    """
    fresh = link.with_name(".model.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(model.relative_to(link.parent))
    fresh.replace(link)
