"""Training objectives of a student: InfoNCE with a queue, or the teacher's ranking (listwise).

A step draws its samples from (seed, step) alone, so a resumed run needs no random state. The queue
depends on earlier steps; it is kept in buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_recursive.track_b.neighbours import Floats, Rows
from kimi_recursive.track_b.student import Student, scatter
from kimi_recursive.track_b.truth import Truth

MOVED_SHARE = 0.5


def build_objective(
    student: Student, vectors: Floats, truth: Truth, settings: Mapping[str, Any], seed: int
) -> nn.Module:
    """The objective of a row of the sheet, for training vectors [N, D]."""
    if settings["objective"] == "listwise":
        return Listwise(student, vectors, truth.train, settings, seed)
    close = truth.close_pairs(vectors, settings)
    return InfoNCE(student, vectors, truth.train, close, settings, seed)


def _encode(student: nn.Module, vectors: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The student's vectors in float32. With `amp: bf16` its matrix products are in bfloat16; the
    teacher's vectors, similarities and loss stay in float32."""
    bf16 = settings["amp"] == "bf16"
    with torch.autocast(vectors.device.type, torch.bfloat16, enabled=bf16):
        return student(vectors).float()


class InfoNCE(nn.Module):
    """InfoNCE (van den Oord et al., 2018) with negatives from a queue of the teacher's rows.

    Each anchor has one positive, drawn from its k nearest by the teacher. All anchors of a batch
    share m negatives, drawn from the queue. A negative is masked for an anchor if it is the anchor
    itself, one of its k nearest, or, with `false_neg_mode: threshold`, if the teacher's similarity
    reaches the threshold. The teacher's similarities never change: they are kept as lists of rows.
    The queue holds rows, not outputs, and drawn rows are encoded again, so no key is ever stale.

    Args:
        vectors: The teacher's training vectors [N, D].
        nearest_rows: [N, k].
        close_pairs: Sorted pairs [P, 2] of rows whose similarity reaches the threshold.
        settings: A row of the sheet; `batch_size` is the number of anchors per step.

    Attributes:
        queue: [queue_size] int64, the last anchors.
        pointer: Place of the next anchor in the queue.
        fill: How many places of the queue are taken.
    """

    vectors: Tensor
    queue: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(
        self,
        student: Student,
        vectors: Floats,
        nearest_rows: Rows,
        close_pairs: Rows,
        settings: Mapping[str, Any],
        seed: int,
    ):
        super().__init__()
        self.student, self.seed, self.settings = student, seed, settings
        self.num_rows, self.nearest_rows = len(vectors), nearest_rows[:, : settings["k"]]
        self.register_buffer("vectors", torch.tensor(vectors), persistent=False)
        self.register_buffer("queue", torch.zeros(settings["queue_size"], dtype=torch.int64))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))
        self._starts, self._masked = _lists(self.nearest_rows, close_pairs)
        self._slot_of = np.full(self.num_rows, -1)  # place among the rows drawn in this step, or -1

    def forward(self, _batch: None, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the step from `step` to the next, and what the log shows of it."""
        settings, rng = self.settings, np.random.default_rng([self.seed, step])
        size = settings["batch_size"]
        anchors = rng.integers(self.num_rows, size=size)
        positives = self.nearest_rows[anchors, rng.integers(settings["k"], size=size)]
        self._push(anchors)
        fill = int(self.fill)
        slots = rng.choice(fill, min(settings["neg_m"], fill), replace=False, shuffle=False)
        negatives = self.queue.cpu().numpy()[slots]
        mask = self._mask(anchors, negatives)
        rows = torch.from_numpy(np.concatenate([anchors, positives, negatives]))
        inputs = self.vectors[rows.to(self.vectors.device)]
        encoded = _encode(self.student, inputs, settings).split([size, size, len(negatives)])
        positive = (encoded[0] * encoded[1]).sum(1, keepdim=True)
        negative = encoded[0] @ encoded[2].T
        negative = negative.masked_fill(torch.from_numpy(mask).to(negative.device), -torch.inf)
        logits = torch.cat([positive, negative], 1) / settings["tau"]
        loss = -logits.log_softmax(1)[:, 0].mean()
        num_negatives = mask.size - np.count_nonzero(mask)
        facts = {"num_negatives": num_negatives / size, "queue_fill": fill}
        return loss, {**facts, "batch_size": size, "anchors": size}

    def _push(self, rows: Rows) -> None:
        size, pointer = len(self.queue), int(self.pointer)
        rows = rows[-size:]
        places = (pointer + np.arange(len(rows))) % size
        self.queue[torch.from_numpy(places)] = torch.from_numpy(rows).to(self.queue.device)
        self.pointer.fill_((pointer + len(rows)) % size)
        self.fill.fill_(min(size, int(self.fill) + len(rows)))

    def _mask(self, anchors: Rows, negatives: Rows) -> np.ndarray:
        """True for negatives [m] that an anchor must not be pushed away from [B, m]. If a row was
        drawn twice, one of the two is masked."""
        slots = np.arange(len(negatives))
        self._slot_of[negatives] = slots
        counts = self._starts[anchors + 1] - self._starts[anchors]
        ends = counts.cumsum()
        entries = np.arange(ends[-1]) + np.repeat(self._starts[anchors] - ends + counts, counts)
        slot = self._slot_of[self._masked[entries]]
        mask = np.broadcast_to(self._slot_of[negatives] != slots, (len(anchors), len(slots))).copy()
        hit = slot >= 0
        mask[np.repeat(np.arange(len(anchors)), counts)[hit], slot[hit]] = True
        self._slot_of[negatives] = -1
        return mask


def _lists(nearest_rows: Rows, close_pairs: Rows) -> tuple[Rows, Rows]:
    """The rows that each row must not be pushed away from: itself, its nearest, and close ones.

    Returns: starts [N + 1] of each row's part in the second array.
    """
    num_rows, k = nearest_rows.shape
    own = np.arange(num_rows)
    first = np.concatenate([own, np.repeat(own, k), close_pairs[:, 0]])
    second = np.concatenate([own, nearest_rows.ravel(), close_pairs[:, 1]])
    pairs = np.unique(first * num_rows + second)
    first, second = np.divmod(pairs, num_rows)
    return np.searchsorted(first, np.arange(num_rows + 1)), second


class Listwise(nn.Module):
    """KL divergence from the teacher's softmax over a batch to the student's, mean over points.

    A batch is `batch_size` anchors, `num_positives` of the k nearest rows of each, and `neg_m`
    other rows, without repeats. Both softmaxes are over similarities to the other points, at
    temperature tau.

    Any unit vector is a valid training point, because the teacher's similarities follow from it.
    With `mix`, half of the points move towards one of their k nearest, by at most that share of the
    way. With `noise`, half move by that share of a normal draw with the covariance of the vectors.
    Teacher and student see the moved points.

    Args: see `InfoNCE`.
    """

    vectors: Tensor
    factor: Tensor

    def __init__(
        self,
        student: Student,
        vectors: Floats,
        nearest_rows: Rows,
        settings: Mapping[str, Any],
        seed: int,
    ):
        super().__init__()
        self.student, self.seed, self.settings = student, seed, settings
        self.nearest_rows = nearest_rows[:, : settings["k"]]
        self.register_buffer("vectors", torch.tensor(vectors), persistent=False)
        if settings["noise"]:
            covariance = scatter(vectors, centred=True) / (len(vectors) - 1)
            covariance += 1e-7 * np.eye(len(covariance))  # it may be singular
            factor = settings["noise"] * np.linalg.cholesky(covariance).T
            self.register_buffer("factor", torch.from_numpy(factor).float(), persistent=False)

    def forward(self, _batch: None, step: int) -> tuple[Tensor, dict[str, Any]]:
        """Loss of the step from `step` to the next, and what the log shows of it."""
        settings, rng = self.settings, np.random.default_rng([self.seed, step])
        size, num_rows = settings["batch_size"], len(self.vectors)
        anchors = rng.integers(num_rows, size=size)
        order = rng.random((size, settings["k"])).argsort(1)[:, : settings["num_positives"]]
        positives = self.nearest_rows[anchors[:, None], order].ravel()
        others = rng.integers(num_rows, size=settings["neg_m"])
        rows = np.unique(np.concatenate([anchors, positives, others]))
        points = self.vectors[torch.from_numpy(rows).to(self.vectors.device)]
        points = self._moved(points, rows, rng)
        encoded = _encode(self.student, points, settings)
        teacher, student = (_log_softmax(x, settings["tau"]) for x in (points, encoded))
        loss = (teacher.exp() * (teacher - student)).sum(1).mean()
        return loss, {"num_points": len(rows), "batch_size": size, "anchors": size}

    def _moved(self, points: Tensor, rows: Rows, rng: np.random.Generator) -> Tensor:
        mix, noise, device = self.settings["mix"], self.settings["noise"], points.device
        if mix:
            near = self.nearest_rows[rows, rng.integers(self.settings["k"], size=len(rows))]
            share = mix * rng.random(len(rows)) * (rng.random(len(rows)) < MOVED_SHARE)
            share = torch.from_numpy(share[:, None].astype(np.float32)).to(device)
            points = points.lerp(self.vectors[torch.from_numpy(near).to(device)], share)
        if noise:
            moved = torch.from_numpy(np.flatnonzero(rng.random(len(rows)) < MOVED_SHARE)).to(device)
            draw = rng.standard_normal((len(moved), points.shape[1]), dtype=np.float32)
            points = points.index_add(0, moved, torch.from_numpy(draw).to(device) @ self.factor)
        return F.normalize(points, dim=1) if mix or noise else points


def _log_softmax(x: Tensor, tau: float) -> Tensor:
    """Log-softmax of each point's similarities to the others [n, n]. The logit of the point itself
    is far below all others, but finite."""
    return ((x @ x.T) / tau).fill_diagonal_(-1e4).log_softmax(1)
