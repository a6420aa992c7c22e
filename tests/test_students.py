"""Students: what they start as, what they are trained to do, and that a run goes on exactly."""

import json
import os
import signal

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from conftest import error_of
from track_b import V1, V2, make_teacher, settings_of

from kimi_recursive.checkpoint import complete_checkpoints
from kimi_recursive.loop import Diverged, Interrupted
from kimi_recursive.track_b.evaluate import score_all
from kimi_recursive.track_b.metrics import NDCG, RECALL
from kimi_recursive.track_b.objectives import MOVED_SHARE, InfoNCE, Listwise, build_objective
from kimi_recursive.track_b.status import read_status
from kimi_recursive.track_b.student import Student, build_student, scatter, svd_projection
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.train import train_student
from kimi_recursive.track_b.truth import find_neighbours, load_truth


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def vectors(teacher):
    return np.array(load_vectors(teacher / "teacher")["train"])


@pytest.fixture(scope="module")
def truth(teacher):
    return load_truth(teacher / "neighbours.npz")


# ---- the module ----


def test_the_residual_student_starts_as_the_svd(vectors):
    student = build_student(settings_of(V2), vectors, seed=0)
    axes = torch.linalg.svd(torch.from_numpy(vectors).double(), full_matrices=False).Vh[:8]
    expected = F.normalize(torch.from_numpy(vectors).double() @ axes.T, dim=1)
    found = torch.from_numpy(student.encode(vectors)).double()
    # Axes may point the other way: inner products do not know.
    assert (found @ found.T - expected @ expected.T).abs().max() < 1e-5
    with torch.no_grad():
        student.out.weight.normal_()
    assert np.abs(student.encode(vectors) - found.numpy()).max() > 1e-2, "the MLP is in the path"


def test_scatter_is_the_covariance(vectors):
    covariance = np.cov(vectors, rowvar=False, dtype=np.float64)
    assert np.abs(scatter(vectors, centred=True) / 299 - covariance).max() < 1e-12
    plain = vectors.T.astype(np.float64) @ vectors
    assert np.abs(scatter(vectors, centred=False) - plain).max() < 1e-9


def test_pca_is_centred(vectors):
    centred = torch.from_numpy(vectors - vectors.mean(0)).double()
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:8]
    found = torch.from_numpy(svd_projection(vectors, 8, centred=True)).double()
    assert ((found @ axes.T).abs() - torch.eye(8)).abs().max() < 1e-4


@pytest.mark.parametrize("values", [V1, V2, {**V2, "hidden": 0}, {**V2, "init": "random"}])
def test_outputs_have_unit_length_and_a_saved_student_is_the_same(vectors, values, tmp_path):
    student = build_student(settings_of(values), vectors, seed=3)
    encoded = student.encode(vectors)
    assert encoded.shape == (300, 8) and encoded.dtype == np.float32
    assert np.abs(np.linalg.norm(encoded, axis=1) - 1).max() < 1e-6
    student.save(tmp_path / "a.safetensors")
    student.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = Student.load(tmp_path / "a.safetensors")
    assert np.array_equal(again.encode(vectors), encoded) and again.facts == student.facts


def test_a_file_that_is_no_student(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    assert "safetensors" in error_of(Student.load, tmp_path / "x.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert "not a saved student" in error_of(Student.load, tmp_path / "y.safetensors")


# ---- the objectives, against the plainest way to write them ----


def naive_infonce(student, vectors, anchors, positives, negatives, settings):
    """One anchor at a time, similarities of the teacher computed again."""
    x = torch.from_numpy(vectors)
    y = student(x)
    similarities = x @ x.T
    similarities.fill_diagonal_(-1)
    losses, kept = [], []
    for anchor, positive in zip(anchors, positives, strict=True):
        banned = set(similarities[anchor].topk(settings["k"]).indices.tolist()) | {anchor}
        if settings["false_neg_mode"] == "threshold":
            banned |= set((similarities[anchor] >= settings["threshold"]).nonzero()[:, 0].tolist())
        rows = [row for row in dict.fromkeys(negatives.tolist()) if row not in banned]
        logits = torch.stack([y[anchor] @ y[row] for row in [positive, *rows]]) / settings["tau"]
        losses.append(-logits.log_softmax(0)[0])
        kept.append(len(rows))
    return torch.stack(losses).mean(), np.mean(kept)


@pytest.mark.parametrize("mode", ["threshold", "none"])
def test_infonce_is_what_it_says(vectors, truth, mode):
    settings = settings_of(V1, false_neg_mode=mode)
    student = build_student(settings, vectors, seed=0)
    objective = build_objective(student, vectors, truth, settings, seed=5)
    seen, masked = [], 0
    for step in range(6):
        before = (int(objective.pointer), int(objective.fill))
        loss, parts = objective(None, step)
        rng = np.random.default_rng([5, step])  # what the docstring says it draws, in its order
        anchors = rng.integers(300, size=16)
        ranks = rng.integers(5, size=16)
        seen += anchors.tolist()
        fill = min(50, len(seen))
        assert before == (16 * step % 50, min(50, 16 * step)) and int(objective.fill) == fill
        queue = objective.queue[:fill].tolist()
        assert sorted(queue) == sorted(seen[-50:]), "the last anchors, the oldest dropped first"
        slots = rng.choice(fill, min(32, fill), replace=False, shuffle=False)
        negatives = objective.queue.numpy()[slots]
        positives = truth.train[anchors, ranks]
        expected, kept = naive_infonce(student, vectors, anchors, positives, negatives, settings)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
        assert parts["num_negatives"] == pytest.approx(kept) and parts["queue_fill"] == fill
        masked += len(set(negatives.tolist())) - kept
    assert masked > 1, "nothing was masked: the test shows nothing"


def test_a_positive_is_one_of_the_k_nearest_and_all_of_them_come(vectors, truth):
    settings = settings_of(V1)
    objective = build_objective(build_student(settings, vectors, 0), vectors, truth, settings, 0)
    x = torch.from_numpy(vectors)
    nearest = (x @ x.T).fill_diagonal_(-1).topk(5).indices.numpy()
    assert np.array_equal(np.sort(objective.nearest_rows, 1), np.sort(nearest, 1))


def test_the_false_negative_filter_masks_more_than_the_positives(vectors, truth):
    kept = {}
    for mode in ("threshold", "none"):
        settings = settings_of(V1, false_neg_mode=mode)
        objective = build_objective(
            build_student(settings, vectors, 0), vectors, truth, settings, 0
        )
        kept[mode] = [objective(None, step)[1]["num_negatives"] for step in range(5)]
    assert sum(kept["threshold"]) < sum(kept["none"])


def test_listwise_is_what_it_says(vectors, truth):
    settings = settings_of(V2, noise=0, mix=0, neg_m=20)
    student = build_student(settings_of(V2, init="random"), vectors, seed=0)
    objective = build_objective(student, vectors, truth, settings, seed=5)
    assert isinstance(objective, Listwise)
    loss, parts = objective(None, 2)
    rng = np.random.default_rng([5, 2])
    anchors = rng.integers(300, size=16)
    order = rng.random((16, 5)).argsort(1)[:, :3]
    rows = set(anchors) | set(truth.train[anchors[:, None], order].ravel())
    rows = sorted(rows | set(rng.integers(300, size=20)))
    x = torch.from_numpy(vectors[rows]).double()
    y = student(torch.from_numpy(vectors[rows])).double()
    total = 0.0
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        p, q = ((v[i] @ v[others].T / 0.07).softmax(0) for v in (x, y))
        total += float((p * (p / q).log()).sum().detach())
    assert float(loss.detach()) == pytest.approx(total / len(rows), rel=1e-4)
    assert parts["num_points"] == len(rows) and total > 0.1
    identity = Student("residual", 24, 24, 0)
    with torch.no_grad():
        identity.map.weight.copy_(torch.eye(24))
    same = Listwise(identity, vectors, truth.train, settings, 5)
    assert float(same(None, 2)[0].detach()) < 1e-6, "the teacher itself has no loss"


class Spy(torch.nn.Module):
    """A student that is the teacher, and remembers what it saw."""

    def forward(self, x):
        self.points = x
        return x


def seen(vectors, truth, **more):
    spy = Spy()
    settings = settings_of(V2, **{"noise": 0, "mix": 0, **more})
    loss, _ = Listwise(spy, vectors, truth.train, settings, 0)(None, 0)
    assert float(loss) < 1e-6, "teacher and student see the same points"
    assert (spy.points.norm(dim=1) - 1).abs().max() < 1e-5
    return spy.points


@pytest.mark.parametrize("moves", [{"noise": 0.3}, {"mix": 0.5}])
def test_about_half_of_the_points_are_moved(vectors, truth, moves):
    originals = torch.from_numpy(vectors)
    points = seen(vectors, truth, **moves)
    there = ((points @ originals.T).amax(1) > 1 - 1e-6).float().mean()
    assert 0.3 < there < 0.7 and MOVED_SHARE == 0.5
    still = seen(vectors, truth)
    assert ((still @ originals.T).amax(1) > 1 - 1e-6).all() and len(still) == len(points)


def test_mixed_points_lie_between_a_point_and_one_of_its_nearest(vectors, truth):
    """At most half way: still nearest to where they come from."""
    originals = torch.from_numpy(vectors)
    still, mixed = seen(vectors, truth), seen(vectors, truth, mix=0.5)
    moved = ((still * mixed).sum(1) < 1 - 1e-6).nonzero()[:, 0]
    for i in moved.tolist():
        row = int((originals @ still[i]).argmax())
        near = originals[torch.from_numpy(truth.train[row])]
        # The part of the way: mixed is in the plane of both, between them.
        plane = torch.stack([(mixed[i] - (mixed[i] @ still[i]) * still[i]) @ n for n in near])
        rest = [_distance_from_plane(mixed[i], still[i], n) for n in near]
        best = int(np.argmin(rest))
        assert rest[best] < 1e-3 and plane[best] > 0
        assert mixed[i] @ still[i] >= mixed[i] @ near[best] - 1e-5


def _distance_from_plane(x, a, b) -> float:
    basis = torch.linalg.qr(torch.stack([a, b], 1)).Q
    return float((x - basis @ (basis.T @ x)).norm())


# ---- a run ----


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
    everything = np.array(load_vectors(teacher / "teacher")["all"])
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


@pytest.mark.parametrize("values", [V1, V2])
@pytest.mark.parametrize("step", [1, 6, 10])
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
    assert "a batch of 16 does not fit in memory; going on with 8" in printed
    assert "a batch of 8 does not fit in memory; going on with 4" in printed
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
    assert "resumed at step 12" in capsys.readouterr().err
    run(teacher, tmp_path, V1, tau=0.2)
    assert "starting afresh, settings changed" in capsys.readouterr().err


def test_neighbours_found_for_others_too_do_not_train_again(teacher, tmp_path, capsys):
    run(teacher, tmp_path, V1)
    more = [settings_of(V1), settings_of(V1, k=9, threshold=0.5)]
    find_neighbours(teacher / "teacher", more, tmp_path / "neighbours.npz")
    (tmp_path / "teacher").symlink_to(teacher / "teacher")
    capsys.readouterr()
    run(tmp_path, tmp_path, V1)
    assert "resumed at step 12" in capsys.readouterr().err
    run(tmp_path, tmp_path, V1, threshold=0.5)
    assert "starting afresh, neighbours, settings changed" in capsys.readouterr().err


@pytest.mark.parametrize("values", [V1, V2])
def test_bf16_is_close(teacher, tmp_path, values):
    a, b = (run(teacher, tmp_path / amp, values, amp=amp, steps=30) for amp in ("none", "bf16"))
    assert a["final_loss"] != b["final_loss"]
    assert a["final_loss"] == pytest.approx(b["final_loss"], rel=0.1)
