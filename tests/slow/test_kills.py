"""`make test-slow`: training processes are killed a hundred times, most of them while they write.

Each attempt is forked from a server that has imported everything and run nothing, so that a kill
costs milliseconds and not an import of torch.
"""

import multiprocessing
import random
import signal
from pathlib import Path

import pytest
from models import SMALL, make_base
from runs import SETTINGS, same_run, train_into

from kimi_recursive.training.surgery import insert_cells

pytestmark = pytest.mark.slow
KILLS = 100
CONTEXT = multiprocessing.get_context("forkserver")
LONGER = {"num_steps": 40, "eval_interval": 10, "save_interval": 1}  # writing all the time


def train(root: Path, tokens: Path) -> None:
    """Phases a, b and c, each continued where it was."""
    parent = root / "models/surgery"
    for phase in "abc":
        folder = root / phase
        if not (folder / "train_summary.json").is_file():
            train_into(folder, phase, {**SETTINGS[phase], **LONGER}, parent, tokens)
        parent = folder / "sidecar"


def attempt(root: Path, tokens: Path, seconds: float | None) -> bool:
    """Train in a process of its own, killed after `seconds`; whether it came to its end."""
    process = CONTEXT.Process(target=train, args=(root, tokens))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode == 0


def prepare(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    make_base("kimi").save_pretrained(root / "models/base")
    insert_cells(root / "models/base", {**SMALL, "max_inner_steps": 2}, 0, root / "models/surgery")
    return root


def test_a_hundred_kills_change_nothing(tmp_path, tokens_dir):
    CONTEXT.set_forkserver_preload(
        ["kimi_recursive.training.phases"]
    )  # instead of what project.py needs
    straight = prepare(tmp_path / "straight")
    assert attempt(straight, tokens_dir, None)
    generator = random.Random(0)
    kills = rounds = half_written = 0
    while kills < KILLS:
        rounds += 1
        cut = prepare(tmp_path / f"cut{rounds}")
        done = False
        while not done:
            seconds = None if kills >= KILLS else generator.uniform(0.5, 6.0)
            done = attempt(cut, tokens_dir, seconds)
            kills += not done
            half_written += bool(list(cut.glob("*/work/checkpoints/.step_*.tmp")))
        for phase in "abc":
            same_run(straight / phase, cut / phase)
    print(f"{kills} kills in {rounds} runs, {half_written} of them left half a checkpoint")
    assert half_written > 0, "no kill came in the middle of writing"
