"""Track-B against the usual libraries: a v1 training step, and exact neighbours.

    python benchmarks/track_b.py [--synthetic N] [--vectors N] [--check]

One thread; both sides in turn, medians over rounds; by default on results/track_b/teacher.

steps/s: `InfoNCE`, backward and AdamW with the sheet's core_20k_seed0, against the same loss and
sizes with pytorch-metric-learning, in three forms:

    CrossBatchMemory(NTXentLoss)   the library's InfoNCE: each positive meets every negative pair of
                                   the batch, in matrices [B, B * m] (gigabytes)
    CrossBatchMemory(SupConLoss)   the same loss where there is one positive; masks [B, queue_size]
    SupConLoss, drawn by hand      m entries are drawn before the loss sees the memory

`CrossBatchMemory` compares a batch with its whole memory; the third form goes round that, as who
has found it out may do. The ratio is required against the faster of the first two, the class as it
is; the third is shown, not required. All masks come from similarities of the teacher, 384 numbers
each. Their memory holds earlier steps' outputs, stale and without gradient, where ours encodes the
drawn rows again, with gradient: that is even less work on their side.

neighbours: `nearest_to_each_other`, which also lists the pairs above the threshold, against
`faiss.IndexFlatIP`, add and search of k + 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
import time
from pathlib import Path
from unittest import mock

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ["TQDM_DISABLE"] = "1"

import numpy as np
import torch

from kimi_recursive.track_b.neighbours import nearest_to_each_other
from kimi_recursive.track_b.objectives import InfoNCE
from kimi_recursive.track_b.sheet import read_sheet
from kimi_recursive.track_b.student import build_student
from kimi_recursive.track_b.teacher import load_vectors

try:
    import faiss
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss, SupConLoss
    from pytorch_metric_learning.reducers import MeanReducer
except ImportError as missing:
    print(f"{missing.name} is not installed: pip install -e '.[benchmark]'", file=sys.stderr)
    raise SystemExit(2) from None

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "results/track_b/teacher"
STEP_RATIO, SEARCH_RATIO, LOSS_ERROR, TIE = 3.0, 1.0, 1e-4, 1e-5


class Whole:
    """`CrossBatchMemory` as it is: as with MoCo, keys go into the memory and have no gradient; a
    miner pairs an anchor with its key and with m drawn entries that the teacher holds far."""

    def __init__(self, student, vectors, similarities, nearest_rows, loss, settings):
        self.student, self.rng = copy.deepcopy(student), np.random.default_rng(0)
        self.vectors, self.nearest_rows = torch.tensor(vectors), torch.from_numpy(nearest_rows)
        self.size, self.num_negatives = settings["batch_size"], settings["neg_m"]
        farthest = torch.from_numpy(similarities[:, -1:])  # masked: above the k-th or the threshold
        self.limits = farthest.clamp(max=settings["threshold"]) - 1e-6
        self.memory = CrossBatchMemory(loss, settings["dim"], settings["queue_size"], self.mine)
        with torch.no_grad():
            while not self.memory.has_been_filled:
                rows, _ = self.draw()
                self.memory.add_to_memory(self.student(self.vectors[rows]), rows, self.size)

    def draw(self):
        """Anchors [B] and a positive of each [B]."""
        anchors = torch.from_numpy(self.rng.integers(len(self.vectors), size=self.size))
        place = self.rng.integers(self.nearest_rows.shape[1], size=self.size)
        return anchors, self.nearest_rows[anchors, torch.from_numpy(place)]

    def draw_negatives(self, anchors, memory_rows):
        """Entries of the memory [m], and whose negatives they are [B, m]."""
        size = len(memory_rows)
        drawn = self.rng.choice(size, self.num_negatives, replace=False, shuffle=False)
        return torch.from_numpy(drawn), self.far(anchors, memory_rows[drawn])

    def far(self, anchors, rows):
        """Which rows are negatives of which anchors [B, m]; of a row drawn twice only one is."""
        slots, slot_of = torch.arange(len(rows)), torch.zeros(len(self.vectors), dtype=torch.int64)
        slot_of[rows] = slots
        far = self.vectors[anchors] @ self.vectors[rows].T < self.limits[anchors]
        return far & (slot_of[rows] == slots)

    def mine(self, _embeddings, anchors, _memory, memory_rows):
        drawn, far = self.draw_negatives(anchors, memory_rows)
        anchor, place = torch.where(far)
        return torch.arange(self.size), self.memory.curr_batch_idx, anchor, drawn[place]

    def loss(self):
        anchors, positives = self.draw()
        with torch.no_grad():
            keys = self.student(self.vectors[positives])
        encoded = torch.cat([self.student(self.vectors[anchors]), keys])
        are_keys = torch.arange(len(encoded)) >= self.size
        return self.memory(encoded, torch.cat([anchors, positives]), enqueue_mask=are_keys)


class Drawn(Whole):
    """Of the memory only the storage; the loss sees positives, with gradient, and m entries."""

    def loss(self):
        anchors, positives = self.draw()
        encoded = self.student(self.vectors[torch.cat([anchors, positives])]).split(self.size)
        self.memory.add_to_memory(encoded[0], anchors, self.size)
        drawn, far = self.draw_negatives(anchors, self.memory.label_memory)
        negatives = self.memory.embedding_memory[drawn]
        return loss_of_pairs(self.memory.loss, *encoded, negatives, far)


def loss_of_pairs(loss, anchors, positives, negatives, far):
    """Their loss of given pairs: an anchor with its positive, and with negatives where far."""
    own, (anchor, place) = torch.arange(len(anchors)), torch.where(far)
    pairs = own, own, anchor, len(anchors) + place
    return loss(anchors, None, pairs, torch.cat([positives, negatives]))


def agreement(objective: InfoNCE, their: Whole, losses) -> float:
    """Print, and return, how far their losses are from ours on one step's outputs and pairs."""
    student, mask = objective.student, objective._mask
    with (
        mock.patch.object(student, "forward", wraps=student.forward) as encoding,
        mock.patch.object(objective, "_mask", wraps=mask) as masking,
    ):
        values = {"ours": objective(None, 0)[0].item()}
    rows = masking.call_args.args
    far = ~torch.from_numpy(mask(*rows))
    encoded = student(*encoding.call_args.args).detach()
    parts = encoded.split([their.size, their.size, their.num_negatives])
    values |= {type(x).__name__: loss_of_pairs(x, *parts, far).item() for x in losses}
    differing = (their.far(*map(torch.from_numpy, rows)) != far).sum()
    print("loss of the same pairs:", ", ".join(f"{name} {x:.6f}" for name, x in values.items()))
    print(f"masked by one side only: {differing} of {far.numel():,}")
    return max(values.values()) - min(values.values())


def interleaved(calls, rounds: int):
    """Print and return, by name, the median over rounds of seconds over those of the first."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < 0.1:
                call()
                count += 1
            seconds[name].append((time.perf_counter() - start) / count)
    seconds = {name: np.array(x[1:]) for name, x in seconds.items()}  # the first one warms up
    ratios = {name: np.median(x / seconds["ours"]) for name, x in seconds.items()}
    for name, x in seconds.items():
        middle = np.median(x)
        print(f"{name:28}{middle * 1e3:9.1f} ms{1 / middle:9.2f}/s{ratios[name]:9.2f}")
    return ratios


def stepper(student, loss, settings):
    rates = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    optimizer = torch.optim.AdamW(student.parameters(), **rates)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_steps(vectors, rounds: int) -> bool:
    sheet = read_sheet(ROOT / "config/track_b.tsv")
    settings = next(row.settings for row in sheet if row.name == "core_20k_seed0")
    similarities, rows, close = nearest_to_each_other(vectors, settings["k"], settings["threshold"])
    student = build_student(settings, vectors, 0)
    objective = InfoNCE(copy.deepcopy(student), vectors, rows, close, settings, 0)
    objective._push(np.random.default_rng(0).integers(len(vectors), size=settings["queue_size"]))
    kwargs = {"temperature": settings["tau"], "reducer": MeanReducer()}
    kwargs["distance"] = DotProductSimilarity(normalize_embeddings=False)  # they are of unit length
    losses = NTXentLoss(**kwargs), SupConLoss(**kwargs)
    given = student, vectors, similarities, rows
    forms = {f"CrossBatchMemory({type(x).__name__})": Whole(*given, x, settings) for x in losses}
    forms["SupConLoss, drawn by hand"] = Drawn(*given, losses[1], settings)

    steps = itertools.count(1)
    calls = {"ours": stepper(objective.student, lambda: objective(None, next(steps))[0], settings)}
    calls |= {name: stepper(form.student, form.loss, settings) for name, form in forms.items()}
    print(f"training step, {len(vectors):,} vectors, median of {rounds} rounds in turn")
    error = agreement(objective, next(iter(forms.values())), losses)
    ratios = interleaved(calls, rounds)
    ratio = min(ratios[name] for name in ratios if name.startswith("CrossBatchMemory"))
    met = ratio >= STEP_RATIO and error <= LOSS_ERROR
    outcome = "met" if met else "NOT met"
    print(f"required: {STEP_RATIO} of CrossBatchMemory, losses within {LOSS_ERROR:.0e}: {outcome}")
    return met


def compare_neighbours(vectors, rounds: int, k: int = 50) -> bool:
    found = {}

    def ours():
        found["ours"] = nearest_to_each_other(vectors, k, 0.8)[:2]

    def theirs():
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        found["faiss"] = index.search(vectors, k + 1)

    print(f"neighbours, {vectors.shape}, k {k}, median of {rounds} rounds in turn")
    ratio = interleaved({"ours": ours, "faiss.IndexFlatIP": theirs}, rounds)["faiss.IndexFlatIP"]
    own = found["faiss"][1] == np.arange(len(vectors))[:, None]
    own[~own.any(1), -1] = True  # its copies came first: the last one is too much
    values, rows = (x[~own].reshape(-1, k) for x in found["faiss"])
    equal = (np.sort(rows) == np.sort(found["ours"][1])).all(1)
    tied = (np.abs(values - found["ours"][0]) <= TIE).all(1)
    met = ratio >= SEARCH_RATIO and bool((equal | tied).all())
    print(f"equal sets: {equal.mean():.2%}; or equal but for ties: {(equal | tied).mean():.2%}")
    print(f"required: {SEARCH_RATIO}, all sets: {'met' if met else 'NOT met'}")
    return met


def synthetic(num: int, dim: int = 384):
    """Unit vectors in clusters of about 20."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((num // 20 + 1, dim), dtype=np.float32)
    spread = rng.uniform(0.4, 1.2, (num, 1)).astype(np.float32)
    noise = rng.standard_normal((num, dim), dtype=np.float32)
    vectors = centres[rng.integers(len(centres), size=num)] + spread * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--synthetic", type=int, metavar="N", help="N synthetic vectors for both")
    parser.add_argument("--vectors", type=int, metavar="N", help="N synthetic for neighbours alone")
    parser.add_argument("--only", choices=("steps", "neighbours"))
    parser.add_argument("--rounds", type=int, default=7, help="of each side, in turn (default 7)")
    parser.add_argument("--check", action="store_true", help="exit 1 below the required ratios")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    if args.synthetic is not None:
        train = everything = synthetic(args.synthetic)
    elif (TEACHER / "vectors.npy").is_file():
        found = load_vectors(TEACHER)
        train, everything = np.array(found["train"]), np.array(found["all"])
    else:
        parser.error(f"no {TEACHER}: run the workflow, or give --synthetic N")
    if args.vectors is not None:
        everything = synthetic(args.vectors)
    met = args.only == "neighbours" or compare_steps(train, args.rounds)
    met &= args.only == "steps" or compare_neighbours(everything, args.rounds)
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
