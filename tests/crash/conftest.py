"""A tiny project for the tests that harm one."""

import shutil
from pathlib import Path

import pytest
from tiny import write_data, write_model


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its data. Read only."""
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "base")
    write_data(folder)
    return folder


@pytest.fixture
def project(written: Path, tmp_path: Path) -> Path:
    """A project of the test's own, to be harmed."""
    return Path(shutil.copytree(written, tmp_path / "project"))
