"""Models on the CPU: KimiLinear and the other architectures that the wrapper serves."""

from pathlib import Path

import pytest
from kinds import base, kind  # noqa: F401
from saved import model_dir  # noqa: F401

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items) -> None:
    """Mark what runs on another architecture than KimiLinear, which `make check` leaves out."""
    for item in items:
        if FOLDER in item.path.parents and hasattr(item, "callspec"):
            kind = str(item.callspec.params.get("kind", "kimi"))
            if not kind.startswith("kimi"):
                item.add_marker(pytest.mark.other_bases)
