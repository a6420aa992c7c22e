"""Where the metrics of a run are shown beside its own files, through accelerate's trackers.

Nothing leaves the machine unless the user says so: TensorBoard and trackio write to the disk, and
wandb runs offline where `WANDB_MODE` is not set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kimi_recursive.doors import missing_extra

TRACKERS = ("tensorboard", "trackio", "wandb")
DEFAULT = ("tensorboard",)
PROJECT = "kimi-recursive"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of `TRACKERS`, or whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"tracking: must be of {', '.join(TRACKERS)}, got {name!r}")
        with missing_extra("tracking", f"tracking: {name}"):
            if name not in DEFAULT and find_spec(name) is None:
                raise ImportError(f"No module named {name!r}")


def start_trackers(
    names: Sequence[str],
    directory: Path,
    run: str,
    config: Mapping[str, Any],
    last_step: int | None,
) -> list[Any]:
    """Start or continue a run in each of these trackers.

    Args:
        directory: The experiment directory; TensorBoard and wandb write into its `logs/`.
        run: What the run is called; the same run goes on under the same name.
        config: What to show as the run's settings.
        last_step: Steps behind it are logged again, and replace those that were; None in a new run.
    """
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    logs, found = str(directory / "logs"), []
    for name in names:
        if name == "tensorboard":
            purge = None if last_step is None else last_step + 1
            tracker: Any = TensorBoardTracker("", logs, purge_step=purge, flush_secs=30)
        elif name == "trackio":
            tracker = TrackioTracker(PROJECT, name=run, resume="allow")
        else:
            mode = os.environ.get("WANDB_MODE", "offline")
            tracker = WandBTracker(
                os.environ.get("WANDB_PROJECT", PROJECT),
                id=run, name=run, resume="allow", dir=logs, mode=mode,
            )  # fmt: skip
        tracker.start()
        if name != "tensorboard":  # it would add a file for each start
            tracker.store_init_configuration(dict(config))
        found.append(tracker)
    return found
