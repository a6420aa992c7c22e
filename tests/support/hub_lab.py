"""Small experiments to publish, and what tests ask of what was published."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import call
from hub_server import TOKEN
from models import SMALL, random_ids

from kimi_recursive import RecursiveConfig, load_model_with_config

BEST = "checkpoints/best/model"
OPTIONS = {
    "a": ["--recursive-config", "config.json"],
    "b": ["--lora-rank", 2],
    "c": ["--unfreeze-every", 2],
}


def make_experiments(root: Path, model_dir: Path, phases: str) -> Path:
    """Experiments by hand, each trained from the one before, in `root/experiments`; their base is
    `root/base`."""
    shutil.copytree(model_dir / "base", root / "base")
    RecursiveConfig(**{**SMALL, "max_inner_steps": 2}).save(root / "config.json")
    parent = root / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for phase in phases:
            code = call(
                patch, "run-experiment", "--experiment-name", phase, "--model-path", parent,
                "--phase", phase, "--num-steps", 4, "--save-interval", 2, "--eval-interval", 2,
                "--batch-size", 2, "--context-length", 16, "--num-validation-windows", 2,
                "--lr", 0.01, "--corpus", model_dir / "docs", *OPTIONS[phase],
            )  # fmt: skip
            assert code == 0
            parent = root / "experiments" / phase / BEST
    return root


def dry_run(monkeypatch, directory, output, *options, repo="user/name") -> int:
    arguments = ["--experiment-dir", directory, "--hf-repo", repo, "--dry-run"]
    return call(monkeypatch, "upload", *arguments, "--output-dir", output, *options)


def local_logits(directory: Path) -> torch.Tensor:
    return load_model_with_config(directory)[0].step_logits(random_ids(2, 8))


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def error_line(output: str) -> str:
    """The only error, which is the last line; there is no traceback."""
    lines = output.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in output, output
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert TOKEN not in output
    return lines[-1]
