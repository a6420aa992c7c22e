"""Students: what they start as, and what they are trained to do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import error_of
from track_b import V1, V2, settings_of

from kimi_recursive.track_b.objectives import MOVED_SHARE, Listwise, build_objective
from kimi_recursive.track_b.student import Student, build_student, scatter, svd_projection
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.truth import load_truth


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
