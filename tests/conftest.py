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


# The first makes the matrix; the second and third do without it.
LONGEST_FIRST = [
    "test_workflow", "test_track_b_workflow", "test_placement", "test_plan", "test_distributed",
    "test_invariants", "test_evaluate", "test_lm_eval", "test_phases", "test_training",
    "test_edits", "test_snippets", "test_hub_upload", "test_verified", "test_halting",
    "test_generate", "test_variants_workflow", "test_native", "test_concurrency",
    "test_report_browser", "test_experiment", "test_composition", "test_report_workflow",
    "test_report", "test_records_runs", "test_tasks_workflow", "test_prefork",
]  # fmt: skip


def pytest_collection_modifyitems(config, items) -> None:
    """Files that take longest first, so that no process is left alone with one at the end."""
    if not hasattr(config, "workerinput"):  # one process: in the order that was asked for
        return
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
