"""Runs of students: they learn, go on exactly where they were cut off, and fail aloud."""

import json
import os
import shutil
import signal

import numpy as np
import polars as pl
import pytest
import torch
from track_b import TEACHER, V1, V2, settings_of

from kimi_recursive.processes.signals import Interrupted
from kimi_recursive.track_b.evaluate import evaluate_references, score_all
from kimi_recursive.track_b.metrics import NDCG, RECALL
from kimi_recursive.track_b.objectives import InfoNCE, Listwise
from kimi_recursive.track_b.status import read_status
from kimi_recursive.track_b.student import Student, svd_projection
from kimi_recursive.track_b.teacher import import_vectors, load_vectors
from kimi_recursive.track_b.train import train_student
from kimi_recursive.track_b.truth import find_neighbours, load_truth
from kimi_recursive.training.checkpoint import complete_checkpoints
from kimi_recursive.training.loop import Diverged


def run(teacher, folder, values, seed=0, **more):
    settings = settings_of(values, **more)
    return train_student(
        settings, seed, teacher / "teacher", teacher / "neighbours.npz", folder / "run"
    )


def files_of(folder) -> dict:
    """Everything of a run but times."""
    found = {p.name: p.read_bytes() for p in (folder / "run/checkpoints").iterdir()}
    logs = pl.read_parquet(folder / "run/logs/train_logs.parquet").drop("anchors_per_second")
    evaluation = pl.read_parquet(folder / "run/evaluation.parquet")
    lines = (folder / "run/logs/train_logs.jsonl").read_text().splitlines()
    jsonl = [{k: v for k, v in json.loads(x).items() if "per_second" not in k} for x in lines]
    last = complete_checkpoints(folder / "run/work")[-1] / "model/queue.safetensors"
    return {
        **found,
        "logs": logs,
        "evaluation": evaluation,
        "jsonl": jsonl,
        "queue": last.read_bytes(),
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        same = a[name].equals(b[name]) if isinstance(a[name], pl.DataFrame) else a[name] == b[name]
        assert same, name


@pytest.mark.parametrize("values", [V1, V2])
def test_a_run_learns_and_leaves_the_files_of_the_guide(teacher, tmp_path, values):
    summary = run(teacher, tmp_path, values, steps=40, eval_every=10, save_every=20)
    logs = pl.read_parquet(tmp_path / "run/logs/train_logs.parquet")
    assert logs["step"].to_list() == list(range(41))
    evaluated = logs.drop_nulls(RECALL)
    assert evaluated["step"].to_list() == [0, 10, 20, 30, 40]
    assert evaluated[RECALL][-1] > evaluated[RECALL][0]
    assert summary["status"] == "completed" and summary["seed"] == 0
    assert summary[f"best_{RECALL}"] == evaluated[RECALL].max()
    assert summary[f"final_{NDCG}"] == evaluated[NDCG][-1]
    names = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {f"student_{x}.safetensors" for x in ("best", "step_20", "step_40")}
    best = Student.load(tmp_path / "run/checkpoints/student_best.safetensors")
    everything = np.array(load_vectors(teacher / "teacher")["database"])
    scores = score_all("student", best.encode(everything), load_truth(teacher / "neighbours.npz"))
    assert scores.equals(pl.read_parquet(tmp_path / "run/evaluation.parquet"))
    own = scores.filter(split="validation", precision="float32")["recall@10"].mean()
    assert own == pytest.approx(summary[f"best_{RECALL}"], abs=1e-12)
    status = read_status(tmp_path / "run", 40)
    assert (status.status, status.best_recall) == ("success", summary[f"best_{RECALL}"])


def test_seeds_differ_and_the_same_seed_does_not(teacher, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(teacher, tmp_path / name, V1, seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert a["student_best.safetensors"] != c["student_best.safetensors"]


# Before the first checkpoint, and between two.
@pytest.mark.parametrize(("values", "step"), [(V1, 6), (V2, 1), (V2, 10)])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    teacher, tmp_path, monkeypatch, values, step
):
    run(teacher, tmp_path / "straight", values)
    kind = InfoNCE if values is V1 else Listwise
    forward = kind.forward

    def interrupted(self, batch, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch, at)

    monkeypatch.setattr(kind, "forward", interrupted)
    with pytest.raises(Interrupted):
        run(teacher, tmp_path / "stopped", values)
    monkeypatch.setattr(kind, "forward", forward)
    status = read_status(tmp_path / "stopped/run", 12)
    assert status.status == "incomplete" and status.detail == f"step {step + 1} of 12"
    run(teacher, tmp_path / "stopped", values)
    assert_same(files_of(tmp_path / "straight"), files_of(tmp_path / "stopped"))


def test_the_queue_is_part_of_the_state(teacher, tmp_path, monkeypatch):
    """Without it in the checkpoint a resumed run would draw other negatives."""
    run(teacher, tmp_path / "straight", V1)
    straight = files_of(tmp_path / "straight")
    forward = InfoNCE.forward

    def forgets(self, batch, at):
        if at == 8:
            self.queue.zero_()
        return forward(self, batch, at)

    monkeypatch.setattr(InfoNCE, "forward", forgets)
    run(teacher, tmp_path / "forgot", V1)
    assert not straight["logs"].equals(files_of(tmp_path / "forgot")["logs"])


def test_a_failed_run_says_so_keeps_its_log_and_can_be_run_again(teacher, tmp_path, monkeypatch):
    run(teacher, tmp_path / "straight", V1)
    forward = InfoNCE.forward

    def breaks(self, batch, at):
        loss, parts = forward(self, batch, at)
        return (loss * float("nan") if at == 7 else loss), parts

    monkeypatch.setattr(InfoNCE, "forward", breaks)
    with pytest.raises(Diverged, match="at step 8"):
        run(teacher, tmp_path / "broken", V1)
    status = read_status(tmp_path / "broken/run", 12)
    assert status.status == "failed" and "Diverged" in status.detail
    logs = pl.read_parquet(tmp_path / "broken/run/logs/train_logs.parquet")
    assert logs["step"].to_list() == list(range(7)), "up to the last checkpoint"
    monkeypatch.setattr(InfoNCE, "forward", forward)
    run(teacher, tmp_path / "broken", V1)
    assert_same(files_of(tmp_path / "straight"), files_of(tmp_path / "broken"))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_batch_that_does_not_fit_is_halved(teacher, tmp_path, monkeypatch, capsys, in_backward):
    forward = InfoNCE.forward

    def out_of_memory(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    def greedy(self, batch, at):
        loss, parts = forward(self, batch, at)
        if at >= 5 and self.settings["batch_size"] > 4:
            if in_backward:
                loss.register_hook(out_of_memory)
            else:
                out_of_memory()
        return loss, parts

    monkeypatch.setattr(InfoNCE, "forward", greedy)
    summary = run(teacher, tmp_path, V1)
    printed = capsys.readouterr().err
    assert "a batch of 16 does not fit in memory; continuing with 8" in printed
    assert "a batch of 8 does not fit in memory; continuing with 4" in printed
    assert summary["status"] == "completed" and summary["batch_size"] == 4
    logs = pl.read_parquet(tmp_path / "run/logs/train_logs.parquet")
    sizes = logs["batch_size"].to_list()[1:]
    assert sizes == [16] * 4 + [4] * 8, "from the last checkpoint on"
    assert "does not fit" in (tmp_path / "run/work/notes/issues.txt").read_text()


def test_no_batch_fits(teacher, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(InfoNCE, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run(teacher, tmp_path, V1)
    assert read_status(tmp_path / "run", 12).status == "failed"


def test_settings_that_do_not_fit_the_teacher(teacher, tmp_path):
    def refused(**more):
        with pytest.raises(ValueError) as caught:
            run(teacher, tmp_path, V1, **more)
        return str(caught.value)

    assert refused(dim=25) == "dim: must be at most the teacher's (24), got 25"
    assert "k: must be below the number of training sentences (300), got 300" in refused(k=300)


def test_other_hyperparameters_start_afresh_other_intervals_do_not(teacher, tmp_path, capsys):
    run(teacher, tmp_path, V1)
    capsys.readouterr()
    run(teacher, tmp_path, V1, save_every=6)
    assert "was trained before" in capsys.readouterr().err
    run(teacher, tmp_path, V1, tau=0.2)
    assert "starting afresh, settings.tau changed" in capsys.readouterr().err


def test_neighbours_found_for_others_too_do_not_train_again(teacher, tmp_path, capsys):
    run(teacher, tmp_path, V1)
    more = [settings_of(V1), settings_of(V1, k=9, threshold=0.5)]
    find_neighbours(teacher / "teacher", more, tmp_path / "neighbours.npz")
    (tmp_path / "teacher").symlink_to(teacher / "teacher")
    capsys.readouterr()
    run(tmp_path, tmp_path, V1)
    assert "was trained before" in capsys.readouterr().err
    run(tmp_path, tmp_path, V1, threshold=0.5)
    assert "starting afresh, neighbours, settings.threshold changed" in capsys.readouterr().err


def test_extra_vectors_teach_and_are_not_found(teacher, tmp_path):
    """Neighbours of the pool and of the database, each in rows of its own."""
    (tmp_path / "e").mkdir()
    settings = {**TEACHER, "path": str(teacher / "vectors.npy")}
    import_vectors(settings, 200, 50, 50, 0, tmp_path / "e/teacher", num_extra_sentences=None)
    find_neighbours(tmp_path / "e/teacher", [settings_of(V2)], tmp_path / "e/neighbours.npz")
    vectors = load_vectors(tmp_path / "e/teacher")
    truth = load_truth(tmp_path / "e/neighbours.npz")
    assert len(truth.train) == len(vectors["pool"]) == 300 and len(vectors["database"]) == 200
    similar = vectors["pool"] @ vectors["pool"].T
    np.fill_diagonal(similar, -1)
    assert np.array_equal(truth.train, np.argsort(-similar, 1)[:, :5])
    similar = vectors["database"] @ vectors["database"].T
    np.fill_diagonal(similar, -1)
    for split in ("validation", "test"):
        rows = truth.queries[split]
        assert np.array_equal(vectors["database"][rows], vectors[split])
        assert np.array_equal(truth.relevant[split], np.argsort(-similar[rows], 1)[:, :10])
    run(tmp_path / "e", tmp_path, V2)
    table = pl.read_parquet(tmp_path / "run/evaluation.parquet")
    assert table["row"].max() == 199
    inputs = (tmp_path / "e/teacher", tmp_path / "e/neighbours.npz")
    evaluate_references(*inputs, [8], tmp_path / "references.parquet")
    svd = vectors["database"] @ svd_projection(vectors["pool"], 8).T
    svd /= np.linalg.norm(svd, axis=1, keepdims=True)
    found = pl.read_parquet(tmp_path / "references.parquet").filter(method="svd_8").drop("dim")
    assert found.equals(score_all("svd_8", svd, truth)), "references learn from the pool, too"


@pytest.mark.parametrize("values", [V1, V2])
def test_bf16_is_close(teacher, tmp_path, values):
    a, b = (run(teacher, tmp_path / amp, values, amp=amp, steps=30) for amp in ("none", "bf16"))
    assert a["final_loss"] != b["final_loss"]
    assert a["final_loss"] == pytest.approx(b["final_loss"], rel=0.1)


def test_a_finished_student_is_not_trained_again_without_its_work(teacher, tmp_path, capsys):
    first = run(teacher, tmp_path, V1)
    best = (tmp_path / "run/checkpoints/student_best.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/work")
    for part in ("logs", "checkpoints"):
        shutil.rmtree(tmp_path / "run" / part)
    assert run(teacher, tmp_path, V1) == first, (
        "also its id and its times: one training, one record"
    )
    assert "was trained before with the same settings" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/student_best.safetensors").read_bytes() == best
    assert not (tmp_path / "run/work").exists()
    assert run(teacher, tmp_path, V1, seed=1)["best_step"] >= 0
    assert "was trained before" not in capsys.readouterr().err, "another seed"
