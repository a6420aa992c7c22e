"""The experiment directory, and `kimi-recursive run-experiment` as the guide uses it."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import call
from models import SMALL, random_ids
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kimi_recursive import ExperimentTracker, RecursiveConfig, data, load_model_with_config
from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.model.sidecar import Sidecar
from kimi_recursive.processes.signals import Interrupted
from kimi_recursive.records.runs import record_of_experiment
from kimi_recursive.training.loop import Diverged


def record(directory: Path) -> dict:
    return json.loads((directory / "experiment_metadata.json").read_text())


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "logs"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


# ---- the tracker --------------------------------------------------------------------------------


def test_the_directory_of_the_guide(tmp_path):
    config = RecursiveConfig(chunk_width=64, max_chunk_len=64)
    folder = tmp_path / "phase_a_001"
    tracker = ExperimentTracker(
        folder,
        description="testing",
        config=config,
        training_params={"lr": 3e-4},
        paths={"model_path": Path("models/x"), "config_path": None},
    )
    with tracker:
        assert record(folder)["status"] == "running"
        tracker.add_note("loss plateaued")
        tracker.add_issue("out of memory")
        tracker.add_generation_sample(5, "The", " state", token_ids=[1, 2])
        tracker.save_metrics(5, {"loss": 2.5, "lr_sidecar": 3e-4, "none": None})
        tracker.set_best(5, {"loss": 2.5})
        tracker.finish({"loss": 2.5})
    found = record(folder)
    assert found["status"] == "completed" and found["final_results"] == {"loss": 2.5}
    assert found["experiment_name"] == "phase_a_001" and found["best_checkpoint_step"] == 5
    assert re.fullmatch(r"phase_a_001_\d{8}T\d{6}", found["experiment_id"])
    assert found["versions"]["torch"] == torch.__version__ and "cuda" in found["versions"]
    assert {"python", "transformers", "kimi-recursive"} <= found["versions"].keys()
    assert found["host"] and found["training_params"] == {"lr": 3e-4}
    assert found["paths"] == {"model_path": "models/x", "config_path": None}
    assert found["created_at"].endswith("+00:00")
    assert RecursiveConfig.from_file(folder / "recursive_config.json") == config
    metrics = json.loads((folder / "metrics/step_000005.json").read_text())
    assert metrics == {"step": 5, "loss": 2.5, "lr_sidecar": 3e-4}
    assert scalars(folder, "loss") == [(5, 2.5)]
    notes = (folder / "notes/notes.txt").read_text()
    headings = re.findall(r"^\d\. (\w+)", notes, re.MULTILINE)
    assert headings == [
        "Hypothesis", "Setup", "Observations", "Issues", "Results", "Conclusions",
    ]  # fmt: skip
    assert notes.startswith("1. Hypothesis: what is tested?\ntesting\n\n2. Setup")
    assert notes.endswith("] loss plateaued\n")
    assert (folder / "notes/issues.txt").read_text().endswith("] out of memory\n")
    sample = json.loads((folder / "notes/generation_samples.jsonl").read_text())
    assert sample == {"step": 5, "prompt": "The", "completion": " state", "token_ids": [1, 2]}


def test_notes_can_be_added_later_without_touching_the_record(tmp_path):
    with ExperimentTracker(tmp_path, "x", "why") as tracker:
        tracker.finish({"loss": 1.0})
    ExperimentTracker(tmp_path).add_note("generation improved")
    found = record(tmp_path)
    assert (found["experiment_name"], found["description"]) == ("x", "why")
    assert found["status"] == "completed" and found["final_results"] == {"loss": 1.0}


def test_metrics_that_are_not_finite_are_null_and_flagged(tmp_path):
    tracker = ExperimentTracker(tmp_path)
    tracker.save_metrics(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    metrics = json.loads((tmp_path / "metrics/step_000001.json").read_text())
    assert metrics == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1,
                       "non_finite": ["grad_norm", "loss"]}  # fmt: skip


def test_how_a_run_ended(tmp_path):
    def run(error):
        with pytest.raises(type(error)), ExperimentTracker(tmp_path):
            raise error
        return record(tmp_path)

    found = run(Interrupted(7))
    assert (found["status"], found["last_step"]) == ("interrupted", 7)
    for name in ("step_000004", "step_000003", "step_000009_mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = run(Diverged("loss nan at step 6", 6))
    assert found["status"] == "failed" and found["error"] == "Diverged: loss nan at step 6"
    assert (found["failed_step"], found["last_good_step"]) == (6, 4)
    assert run(MemoryError("no memory"))["failed_step"] is None
    with ExperimentTracker(tmp_path):
        found = record(tmp_path)
        assert not {"error", "failed_step", "last_step", "last_good_step"} & found.keys()
    assert record(tmp_path)["status"] == "completed"


def test_rewinding_drops_what_a_resumed_run_makes_again(tmp_path):
    with ExperimentTracker(tmp_path) as tracker:
        for step in (2, 4, 6):
            tracker.save_metrics(step, {"loss": float(step)})
            tracker.add_generation_sample(step, "p", "c")
        tracker.add_note("stays")
    with ExperimentTracker(tmp_path) as tracker:
        tracker.rewind(4)
        tracker.save_metrics(6, {"loss": 0.5})
    names = sorted(p.name for p in (tmp_path / "metrics").iterdir())
    assert names == [f"step_00000{i}.json" for i in (2, 4, 6)]
    assert scalars(tmp_path, "loss") == [(2, 2.0), (4, 4.0), (6, 0.5)]
    samples = (tmp_path / "notes/generation_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [2, 4]
    samples = tmp_path / "notes/generation_samples.jsonl"
    samples.write_text(samples.read_text() + '{"mine": 1}\nnot json\n{"half')
    (tmp_path / "metrics/step_final.json").write_text("{}")
    ExperimentTracker(tmp_path).rewind(3)
    lines = samples.read_text().splitlines()
    assert lines[1:] == ['{"mine": 1}', "not json"], "what is not ours stays; half a line goes"
    (tmp_path / "metrics/step_final.json").unlink()
    ExperimentTracker(tmp_path).start_afresh()
    assert not list((tmp_path / "metrics").iterdir()) + list((tmp_path / "logs").iterdir())
    assert "stays" in (tmp_path / "notes/notes.txt").read_text()


# ---- run-experiment -----------------------------------------------------------------------------


@pytest.fixture
def arguments(model_dir, tmp_path):
    """The guide's flags, for a tiny base; later pairs replace earlier ones."""
    RecursiveConfig(**{**SMALL, "max_inner_steps": 2}).save(tmp_path / "phase_a.json")
    RecursiveConfig(recursive_enabled=False, chunk_width=8).save(tmp_path / "baseline.json")

    def of(name, *more, **flags) -> list:
        given = {
            "--experiment-name": name,
            "--description": "a test",
            "--model-path": model_dir / "base",
            "--recursive-config": tmp_path / "phase_a.json",
            "--phase": "a",
            "--num-steps": 6,
            "--batch-size": 2,
            "--lr": 3e-4,
            "--warmup-steps": 2,
            "--save-interval": 2,
            "--eval-interval": 3,
            "--log-interval": 2,
            "--seed": 0,
            "--context-length": 16,
            "--num-validation-windows": 4,
            "--corpus": model_dir / "docs",
            "--output-dir": tmp_path / "experiments",
            **{f"--{key.replace('_', '-')}": value for key, value in flags.items()},
        }
        pairs = [x for pair in given.items() if pair[1] is not None for x in pair]
        return ["run-experiment", *pairs, *more]

    return of


def test_the_guide_works_as_written(arguments, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, *arguments("phase_a_001")) == 0
    out = capsys.readouterr().out
    assert "best_validation_loss: " in out and "phase_a_001" in out
    folder = tmp_path / "experiments/phase_a_001"
    found = record(folder)
    assert found["status"] == "completed" and found["description"] == "a test"
    assert found["training_params"]["lr"] == 3e-4 and found["training_params"]["num_steps"] == 6
    assert found["paths"]["recursive_config"] == str(tmp_path / "phase_a.json")
    assert found["paths"]["model_path"] and found["paths"]["corpus"] and found["git_commit"]
    assert found["final_results"]["training_tokens"] == 6 * 2 * 8
    steps = sorted(p.name for p in (folder / "checkpoints").iterdir())
    expected = {f"step_00000{i}" for i in (0, 2, 4, 6)}
    assert expected <= set(steps) and "best" in steps, "all checkpoints are kept"
    for name in steps:
        files = {p.name for p in (folder / "checkpoints" / name).iterdir()}
        assert {"model", "optimizer.pt", "scheduler.pt", "recursive_config.json",
                "checkpoint_metadata.json"} <= files  # fmt: skip
    best = json.loads((folder / "checkpoints/best/checkpoint_metadata.json").read_text())
    assert best["step"] == found["best_checkpoint_step"] == best["best_step"]
    # "Loading Checkpoints", with the package's name and the number padded.
    checkpoint_dir = folder / "checkpoints/step_000004"
    config = RecursiveConfig.from_file(checkpoint_dir / "recursive_config.json")
    model, tokenizer, config = load_model_with_config(
        str(checkpoint_dir / "model"),
        config=config,
    )
    assert tokenizer is not None and config.max_inner_steps == 2
    weights = load_file(checkpoint_dir / "model/sidecar.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in model.cells_state_dict().items())
    assert model.step_logits(random_ids(1, 8)).shape[0] == 3
    metadata = json.loads((checkpoint_dir / "checkpoint_metadata.json").read_text())
    assert metadata["step"] == 4 and metadata["metrics"]["loss"] > 0
    scheduler = torch.load(checkpoint_dir / "scheduler.pt", weights_only=True)
    assert scheduler["last_epoch"] == 4
    # Rates on record: those that the steps used.
    for step, expected_lr in ((2, 3e-4), (4, 3e-4)):  # constant after the warm-up
        metrics = json.loads((folder / f"metrics/step_00000{step}.json").read_text())
        assert isinstance(metrics["lr_sidecar"], float)
        assert metrics["lr_sidecar"] == pytest.approx(expected_lr)
    rates = dict(scalars(folder, "lr_sidecar"))
    assert rates.keys() == {2, 3, 4, 6} and rates[2] == pytest.approx(3e-4)
    samples = [json.loads(x) for x in (folder / "notes/generation_samples.jsonl").open()]
    assert [s["step"] for s in samples] == [0, 3, 6] and samples[0]["completion"]


def test_the_record_of_a_run_by_hand_has_sizes_and_no_path_that_is_gone(
    arguments, model_dir, tmp_path, monkeypatch
):
    """Without --tokens-dir its tokens are deleted afterwards."""
    call(monkeypatch, *arguments("trained", description=None))
    call(monkeypatch, *arguments("scored", recursive_config=tmp_path / "baseline.json"))
    data.tokenize_corpus(model_dir / "corpus", model_dir / "base", tmp_path / "tokens")
    num_tokens = load_tokens(tmp_path / "tokens", "train").num_tokens
    kept = arguments("kept", tokens_dir=tmp_path / "tokens", corpus=None)
    assert call(monkeypatch, *kept) == 0
    for name in ("trained", "scored", "kept"):
        run = record_of_experiment(tmp_path / "experiments" / name)["run_data"]
        found = run["dataset_config"]
        sizes = [found[f"{part}_size"] for part in ("train", "val", "total")]
        assert sizes == [3, 1, 5] and found["domain"] == "language_modeling", name
        assert found["domain_params"]["num_tokens"]["train"] == num_tokens
        assert ("tokens" in found["paths"]) == (name == "kept")
        assert all(Path(path).exists() for path in found["paths"].values()), name
    described = record(tmp_path / "experiments/trained")["description"]
    assert described == "Phase a of the arm recursive with seed 0"


def test_a_cut_off_experiment_goes_on_and_another_is_refused(
    arguments, tmp_path, monkeypatch, capfd
):
    call(monkeypatch, *arguments("straight"))
    call(monkeypatch, *arguments("cut"))
    folder = tmp_path / "experiments/cut"
    shutil.rmtree(folder / "checkpoints/step_000006")
    (folder / "train_summary.json").unlink()
    capfd.readouterr()
    assert call(monkeypatch, *arguments("cut")) == 0
    assert "resumed at step 4" in capfd.readouterr().err
    names = ["sidecar/sidecar.safetensors", "checkpoints/step_000006/model/sidecar.safetensors"]
    for name in names:
        straight = tmp_path / "experiments/straight" / name
        assert (folder / name).read_bytes() == straight.read_bytes()
    assert call(monkeypatch, *arguments("cut", lr=1e-3)) == 2
    error = capfd.readouterr().err
    assert "holds another experiment, with a different" in error and "settings.lr," in error
    assert record(folder)["training_params"]["lr"] == 3e-4
    assert call(monkeypatch, *arguments("cut", "--force", lr=1e-3)) == 0
    assert "starting afresh, settings.lr," in capfd.readouterr().err
    assert record(folder)["training_params"]["lr"] == 1e-3


def test_a_folder_that_is_no_experiment_is_left_alone(arguments, tmp_path, monkeypatch, capfd):
    mine = tmp_path / "experiments/mine"
    (mine / "logs").mkdir(parents=True)
    (mine / "logs/important.txt").write_text("x")
    for more in ([], ["--force"]):
        assert call(monkeypatch, *arguments("mine", *more)) == 2
        assert "exists and holds no experiment; choose another name" in capfd.readouterr().err
    assert [p.name for p in mine.rglob("*")] == ["logs", "important.txt"]
    ExperimentTracker(tmp_path / "experiments/noted").add_note("about to start")
    assert call(monkeypatch, *arguments("noted")) == 0
    shutil.rmtree(tmp_path / "experiments/noted/checkpoints")
    assert call(monkeypatch, *arguments("noted", lr=1e-3)) == 2
    assert "holds another experiment" in capfd.readouterr().err


def test_a_diverging_rerun_does_not_keep_the_results_of_the_run_before(
    arguments, tmp_path, monkeypatch, capfd
):
    call(monkeypatch, *arguments("x"))
    assert call(monkeypatch, *arguments("x", "--force", lr=1e30)) == 2
    assert re.search(r"error: .*(loss|is) .*(nan|inf)", capfd.readouterr().err)
    found = record(tmp_path / "experiments/x")
    assert found["status"] == "failed" and "final_results" not in found
    assert found["training_params"]["lr"] == 1e30 and found["description"] == "a test"
    assert found["last_good_step"] is not None and found["failed_step"] > found["last_good_step"]


def test_a_base_by_its_hub_id(model_dir, arguments, tmp_path, monkeypatch):
    """From the Hub's cache on disk."""
    commit = "0" * 40
    repo = tmp_path / "hub/models--org--tiny"
    shutil.copytree(model_dir / "base", repo / f"snapshots/{commit}")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert call(monkeypatch, *arguments("hub", model_path="org/tiny", revision=commit)) == 0
    facts = Sidecar.open(tmp_path / "experiments/hub/sidecar")
    assert (facts.base_name, facts.revision) == ("org/tiny", commit)


def test_phases_b_and_c_follow_by_hand(arguments, tmp_path, monkeypatch, capfd):
    call(monkeypatch, *arguments("a"))
    b = {"phase": "b", "recursive_config": None, "lora_target": "q_proj"}
    c = {"phase": "c", "recursive_config": None, "unfreeze_every": 2}
    best = tmp_path / "experiments/{}/checkpoints/best/model"
    assert call(monkeypatch, *arguments("b", model_path=str(best).format("a"), **b)) == 0
    assert call(monkeypatch, *arguments("c", model_path=str(best).format("b"), **c)) == 0
    model, _, _ = load_model_with_config(str(best).format("c"))
    assert model.adapter.layers == [1] and len(model.adapter.lora_parameters()) == 2
    capfd.readouterr()
    assert call(monkeypatch, *arguments("x", **b)) == 2
    assert "phase b starts from a model of phase a" in capfd.readouterr().err


def test_a_baseline_run_trains_nothing_and_shows_its_initial_rate(
    arguments, tmp_path, monkeypatch, capsys
):
    flags = {"recursive_config": tmp_path / "baseline.json"}
    assert call(monkeypatch, *arguments("baseline_001", **flags)) == 0
    assert "validation_perplexity: " in capsys.readouterr().out
    folder = tmp_path / "experiments/baseline_001"
    logs = pl.read_parquet(folder / "train_logs.parquet")
    assert logs["lr_sidecar"].to_list() == [3e-4] * 6 and logs["loss"].null_count() == 0
    metrics = json.loads((folder / "metrics/step_000002.json").read_text())
    assert metrics["lr_sidecar"] == 3e-4
    # On the same chunks, step 0 of a fresh recursive run has the base's loss.
    zero = {f"lambda_{n}": 0.0 for n in ("masked", "halt", "len", "ponder", "stability")}
    zero |= {"corruption_rate": 0.0, "corruption_rate_final": 0.0}
    RecursiveConfig(**{**SMALL, **zero}).save(tmp_path / "clean.json")
    flags = {"recursive_config": tmp_path / "clean.json", "lr": 1e-12}  # as good as untrained
    assert call(monkeypatch, *arguments("a", **flags)) == 0
    trained = pl.read_parquet(tmp_path / "experiments/a/train_logs.parquet")
    np.testing.assert_allclose(trained["loss"][1:], logs["loss"], atol=1e-6)
    assert trained["validation_loss_step_0"][0] == logs["validation_loss_step_0"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"phase": "d"}, "--phase: must be one of a, b, c, got 'd'"),
        ({"lr": -1}, "--lr: must be above 0, got -1.0"),
        ({"lr": "nan"}, "--lr: must be above 0, got nan"),
        ({"num_steps": 0}, "'--num-steps': Input should be greater than or equal to 1"),
        ({"warmup_steps": 7}, r"warmup_steps must be at most num_steps \(6\), got 7"),
        ({"experiment_name": "../x"}, "must be a plain folder name"),
        ({"experiment_name": ""}, "must be a plain folder name"),
        ({"seed": 2**31}, "--seed"),
        ({"l2_pull": "inf"}, "--l2-pull: must be at least 0, got inf"),
        ({"output_dir": "/dev/null"}, "Not a directory"),
        ({"model_path": "nothing/at/all"}, "nothing/at/all: no such model directory"),
        ({"context_length": 12}, r"context_length \(12\) must be a multiple of .* \(8\)"),
        ({"recursive_config": "missing.json"}, "missing.json: cannot be read"),
        ({"mixed_precision": "fp8"}, "--mixed-precision: must be one of no, bf16"),
        ({"optimizer": "sgd"}, "--optimizer: must be one of adamw, adamw_8bit"),
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit needs pip install"),
    ],
)
def test_bad_flags_are_one_line_and_exit_2(arguments, monkeypatch, capfd, flags, message):
    name = flags.pop("experiment_name", "x")
    assert call(monkeypatch, *arguments(name, **flags)) == 2
    error = capfd.readouterr().err
    assert re.search(message, error) and "Traceback" not in error
