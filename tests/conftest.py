"""The environment of every test, and the order of the files."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # code of checkpoints, not in the user's home
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"


def pytest_configure(config) -> None:
    """One process that forks (`support/forks.py`) for all processes of the tests."""
    if getattr(config.option, "numprocesses", None):
        import forks

        os.environ[forks.SWITCH] = forks.launch()


LONGEST_FIRST = [
    "test_workflow", "test_track_b_workflow", "test_verified", "test_distributed",
    "test_report", "test_generate", "test_verdict", "test_experiment", "test_hub_upload",
]  # fmt: skip


def pytest_collection_modifyitems(config, items) -> None:
    """Files that take longest first, so that no process is left alone with one at the end."""
    if not hasattr(config, "workerinput"):  # one process: in the order that was asked for
        return
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
