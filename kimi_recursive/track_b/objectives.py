"""What a student is trained to do: InfoNCE with a queue (v1), or the teacher's ranking (listwise).

What a step draws is a function of (seed, step) alone, so a resumed run needs no random state; what
is not, the queue, is kept in buffers.
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
    """The objective that a row of the sheet names, over training vectors [N, D]."""
    if settings["objective"] == "listwise":
        return Listwise(student, vectors, truth.train, settings, seed)
    close = truth.close_pairs(vectors, settings)
    return InfoNCE(student, vectors, truth.train, close, settings, seed)


def _encode(student: nn.Module, vectors: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """The student's vectors in float32; with `amp: bf16` its matrix products are in bfloat16. What
    the teacher says, similarities and loss stay in float32."""
    bf16 = settings["amp"] == "bf16"
    with torch.autocast(vectors.device.type, torch.bfloat16, enabled=bf16):
        return student(vectors).float()


class InfoNCE(nn.Module):
    """InfoNCE (van den Oord et al., 2018) with negatives from a queue of rows of the teacher.

    Each anchor has one positive, drawn from its k nearest by the teacher, and shares m negatives
    with the batch, drawn from the queue. An entry is masked for an anchor when it is the anchor,
    one of its k nearest, or, with `false_neg_mode: threshold`, at least that similar by the
    teacher. Similarities of the teacher never change: they are looked up as lists of rows. The
    queue holds rows, not outputs, and what is drawn is encoded again, so no key is ever stale.

    Args:
        vectors: Of the teacher, for training [N, D].
        nearest_rows: [N, k].
        close_pairs: [P, 2], rows whose similarity reaches the threshold, ordered.
        settings: A row of the sheet; `batch_size` anchors a step.

    Attributes:
        queue: [queue_size] int64, the last anchors; `pointer` is the place of the next one, `fill`
            how many places are taken.
    """

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
        self._slot_of = np.full(self.num_rows, -1)  # of the rows drawn in this step, else -1

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
        """Which negatives [m] an anchor must not be pushed away from [B, m]; of a row that was
        drawn twice only one counts."""
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
    """For each row those it must not be pushed away from: itself, its nearest, all that are close;
    starts [N + 1] into one array."""
    num_rows, k = nearest_rows.shape
    own = np.arange(num_rows)
    first = np.concatenate([own, np.repeat(own, k), close_pairs[:, 0]])
    second = np.concatenate([own, nearest_rows.ravel(), close_pairs[:, 1]])
    pairs = np.unique(first * num_rows + second)
    first, second = np.divmod(pairs, num_rows)
    return np.searchsorted(first, np.arange(num_rows + 1)), second


class Listwise(nn.Module):
    """KL divergence from the teacher's softmax over a batch to the student's, for each point of it.

    A batch is `batch_size` anchors with `num_positives` each of their k nearest, and `neg_m` other
    rows, each once. Both softmaxes are over similarities to the other points, at temperature tau.

    Any unit vector is a point whose similarities the teacher knows, so there is no end of training
    data: with `mix`, half of the points are moved towards one of their k nearest, by at most that
    share of the way; with `noise`, half are moved by that share of a draw from a normal
    distribution with the covariance of the vectors. Teacher and student see the moved points.

    Args: as for `InfoNCE`.
    """

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
            covariance += 1e-7 * np.eye(len(covariance))  # some directions may be empty
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
    """Of each point's similarities to the others [n, n]; the point itself has a logarithm far
    below all others, yet finite."""
    return ((x @ x.T) / tau).fill_diagonal_(-1e4).log_softmax(1)
