"""A project of a user, tiny: the workflow with text and config of its own."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import yaml

from kimi_recursive.processes import prefork

ROOT = Path(__file__).parents[2]
SNAKEMAKE = [sys.executable, "-m", "snakemake"]
# Snakemake runs in forks of a process that has imported it, which takes longer than a dry run.
# Polars is not among the modules, as its threads do not survive a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "snakemake.cli", "snakemake.report.html_reporter", "snakemake.script", "smart_open",
    "snakemake_executor_plugin_slurm", "jsonschema", "jsonschema_rs", "pandas", "pyarrow",
])  # fmt: skip
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

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess:
        return snakemake(self.folder, "--configfile", "tiny.yaml", "--cores", "2", *arguments)

    def planned(self, *arguments: str) -> list[str]:
        """Names of the rules that a dry run would run, without `all`."""
        done = self.snakemake("--dry-run", *arguments)
        assert done.returncode == 0, done.stderr
        rules = re.findall(r"^(?:local)?rule (\w+):", done.stdout + done.stderr, re.MULTILINE)
        return sorted(set(rules) - {"all"})

    def path(self, name: str) -> Path:
        return self.folder / name


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What `python -m snakemake` does in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    if "--dry-run" not in arguments:
        environment |= shared_prefork()
    with tempfile.TemporaryDirectory() as scratch:
        process = FORKS.Process(target=_snakemake, args=(arguments, folder, environment, scratch))
        process.start()
        process.join(timeout=1200)
        if too_long := process.is_alive():
            process.kill()
        printed = [Path(scratch, name).read_text() for name in ("stdout", "stderr")]
    assert not too_long, f"{arguments}: not done after 20 minutes\n{printed[1]}"
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _snakemake(
    arguments: tuple[str, ...], folder: Path, environment: dict[str, str], scratch: str
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(folder)]
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(scratch, name), os.O_WRONLY | os.O_CREAT), stream)
    from snakemake.cli import main

    main(list(arguments))


@cache
def shared_prefork() -> dict[str, str]:
    """The environment in which Snakemake runs scripts in forks of one process of all tests."""
    program = Path(prefork.launch())
    while not program.with_name("socket").exists():
        time.sleep(0.05)
    return {prefork.SWITCH: str(program)}
