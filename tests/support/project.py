"""A project of a user, tiny: the workflow with text and config of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import yaml

from kimi_recursive.processes import prefork

ROOT = Path(__file__).parents[2]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
EXPECTED = [
    "prepare_corpus", "train_tokenizer", "tokenize_corpus", "train_base", "insert_cells",
    "evaluate", "compare_zero_init", "train_phase", "compare_repeat", "plot_perplexity_by_step",
    "summarize", "report",
]  # fmt: skip
ARMS = ["recursive", "single_pass", "single_pass_flops"]
VANILLA = ["vanilla", "vanilla_flops"]  # from phase b on
PHASE_A = ["baseline", "after_surgery", *(f"finetuned_{arm}" for arm in ARMS)]
STAGES = [*PHASE_A, *(f"finetuned_{arm}_b" for arm in [*ARMS, *VANILLA])]
PHASE = {
    "num_steps": 6, "batch_size": 2, "context_length": 32, "warmup_steps": 1,
    "eval_interval": 3, "save_interval": 2, "num_validation_windows": 4,
}  # fmt: skip
TINY = {
    "corpus": {"source": "docs/*.txt", "validation": 0.2, "test": 0.2},
    "tokenizer": {"vocab_size": 320},
    "base": {
        "architecture": {
            "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32,
            "num_attention_heads": 2, "num_experts": 4, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "linear_head_dim": 16, "linear_num_heads": 2,
        },
        "training": {
            "num_steps": 12, "batch_size": 2, "context_length": 32, "warmup_steps": 2,
            "eval_interval": 6, "save_interval": 4, "num_validation_windows": 4,
        },
    },
    "recursive": {"chunk_width": 16, "d_state": 8, "gate_hidden": 16, "max_chunk_len": 16},
    "evaluation": {
        "context_length": 32, "batch_size": 4, "max_windows_per_document": 2,
        "prompts": ["document 1"], "max_new_tokens": 8,
    },
    "phases": ["a", "b"],
    "training": {
        "a": PHASE,
        "b": {**PHASE, "num_steps": 3, "lr_lora": 2.0e-3, "lora": {"rank": 2}},
        "c": PHASE,
    },
    "composition": None,
    "track_b": {"enabled": False},
}  # fmt: skip
ONLY_A = {**TINY, "phases": ["a"], "repeat": False}


class Project:
    """The workflow in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def make(cls, folder: Path) -> "Project":
        """A copy of the checkout's workflow with tiny text and config."""
        for name in ("Snakefile", "rules", "workflow", "profiles", "config"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
        (folder / "kimi_recursive").symlink_to(ROOT / "kimi_recursive")
        (folder / "docs").mkdir()
        for i in range(10):
            lines = [f"document {i}, line {n}: {n * i} is {n} times {i}." for n in range(20)]
            (folder / f"docs/{i}.txt").write_text("\n".join(lines))
        project = cls(folder)
        project.write(TINY)
        return project

    def copy(self, target: Path) -> "Project":
        return Project(shutil.copytree(self.folder, target, symlinks=True))

    def write(self, config: dict) -> None:
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(config))

    def snakemake(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        given = ("--configfile", "tiny.yaml", "--cores", "2", *arguments)
        return snakemake(self.folder, *given, **environment)

    def planned(self, *arguments: str) -> list[str]:
        """Names of the rules that a dry run would run, without `all`."""
        done = self.snakemake("--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        rules = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
        return sorted(set(rules) - {"all"})

    def path(self, name: str) -> Path:
        return self.folder / name


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """What `python -m snakemake` does in a folder."""
    return run_python(folder, "-m", "snakemake", *arguments, **environment)


def run_python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """What `python ARGUMENTS` does in the folder of a project, in forks (`forks.py`)."""
    own = {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", **shared_prefork()}
    return subprocess.run(
        [forks.python(), *arguments],
        cwd=folder,
        env={**os.environ, **own, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def shared_prefork() -> dict[str, str]:
    """The environment in which Snakemake runs scripts in forks of the one process of all tests."""
    return {prefork.SWITCH: forks.python()}
