"""The whole matrix at a tiny size, made once."""

import fcntl
import os

import pytest
from project import EXPECTED, Project


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """The whole matrix, run once for all processes of the tests; a copy for each."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    done = folder / "matrix"
    with open(folder / "matrix.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            project = Project.make(tmp_path_factory.mktemp("project"))
            assert project.planned() == sorted(EXPECTED)
            made = project.snakemake("all")
            assert made.returncode == 0, made.stderr[-4000:]
            project.folder.rename(done)
    return Project(done).copy(tmp_path_factory.mktemp("project") / "copy")


@pytest.fixture
def copy(project, tmp_path) -> Project:
    """A copy of the finished project that a test may damage."""
    return project.copy(tmp_path / "copy")
