"""Trainings, evaluations, records and uploads in the process of the test."""

from pathlib import Path

import pytest
from kinds import base, kind  # noqa: F401
from saved import model_dir, surgery_dir, tokens_dir  # noqa: F401
from tiny_matrix import copy, project  # noqa: F401
from track_b import make_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """What `make_teacher` makes, for tests that do not write into it."""
    return make_teacher(tmp_path_factory.mktemp("teacher"))
