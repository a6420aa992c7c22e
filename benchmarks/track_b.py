"""Track-B against the usual libraries: a v1 training step, and exact neighbours.

    python benchmarks/track_b.py [--synthetic N] [--vectors N] [--check]

One thread; both sides in turn, medians over rounds. By default on the vectors of
results/track_b/teacher, with the sheet's row core_20k_seed0.

steps/s: `InfoNCE`, backward and AdamW, against the same loss and sizes with
pytorch-metric-learning, in three forms:

    CrossBatchMemory(NTXentLoss)   the library's InfoNCE; compares each positive with every negative
                                   pair of the batch, so it takes B * B * m numbers (over 1 GB)
    CrossBatchMemory(SupConLoss)   with one positive the same loss, on a mask [B, queue_size]
    SupConLoss, drawn by hand      m entries are drawn before the loss sees the memory

`CrossBatchMemory` always compares the batch with all of its memory; the third form is no use of
it, but what someone writes who has found that out. The ratio is required against the faster of the
first two, the class as it is; the third is shown beside them and not required.

Their memory holds outputs of earlier steps, 128 numbers each and without gradient, which get stale;
ours holds rows and encodes the drawn ones again, with gradient. Theirs is thus even less work.

neighbours: `nearest_to_each_other` (which also lists the pairs above the threshold) against
`faiss.IndexFlatIP`, add and search of k + 1.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path

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
    from pytorch_metric_learning.miners import BaseMiner
    from pytorch_metric_learning.reducers import MeanReducer
except ImportError as missing:
    print(f"{missing.name} is not installed: pip install -e '.[benchmark]'", file=sys.stderr)
    raise SystemExit(2) from None

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "results/track_b/teacher"
STEP_RATIO, SEARCH_RATIO = 3.0, 1.0
LOSS_ERROR, TIE = 1e-4, 1e-5


class Corpus:
    """What their step draws from: as ours, but similarities of the teacher are computed."""

    def __init__(self, vectors, similarities, nearest_rows, settings):
        self.vectors, self.nearest_rows = torch.tensor(vectors), torch.from_numpy(nearest_rows)
        farthest = torch.from_numpy(similarities[:, -1])  # a row's limit: its k-th, or the filter's
        self.limits = farthest.clamp(max=settings["threshold"])[:, None] - 1e-6
        self.rng = np.random.default_rng(0)
        self.size, self.num_negatives = settings["batch_size"], settings["neg_m"]

    def batch(self):
        """Anchors [B] and a positive of each [B]."""
        anchors = torch.from_numpy(self.rng.integers(len(self.vectors), size=self.size))
        place = self.rng.integers(self.nearest_rows.shape[1], size=self.size)
        return anchors, self.nearest_rows[anchors, torch.from_numpy(place)]

    def draw(self, fill):
        """Entries of a memory [m]."""
        drawn = self.rng.choice(fill, self.num_negatives, replace=False, shuffle=False)
        return torch.from_numpy(drawn)

    def allowed(self, anchors, rows):
        """Which rows are negatives of which anchors [B, m]; of a row drawn twice only one is."""
        slots = torch.arange(len(rows))
        slot_of = torch.zeros(len(self.vectors), dtype=torch.int64)
        slot_of[rows] = slots
        far = self.vectors[anchors] @ self.vectors[rows].T < self.limits[anchors]
        return far & (slot_of[rows] == slots)


class Miner(BaseMiner):
    """Anchors with their positives, the newest entries of the memory, and with m drawn entries."""

    def mine(self, embeddings, labels, ref_emb, ref_labels):
        drawn = self.corpus.draw(len(ref_labels))
        anchor, place = torch.where(self.corpus.allowed(labels, ref_labels[drawn]))
        return torch.arange(len(labels)), self.newest(), anchor, drawn[place]


class Whole:
    """`CrossBatchMemory` as it is; as with MoCo, keys go into the memory and have no gradient."""

    def __init__(self, student, corpus, loss, settings):
        self.student, self.corpus, self.miner = student, corpus, Miner()
        self.memory = CrossBatchMemory(loss, settings["dim"], settings["queue_size"], self.miner)
        self.miner.corpus, self.miner.newest = corpus, lambda: self.memory.curr_batch_idx
        self.are_keys = torch.arange(2 * corpus.size) >= corpus.size

    @torch.no_grad()
    def fill(self):
        while not self.memory.has_been_filled:
            anchors, _ = self.corpus.batch()
            rows = self.student(self.corpus.vectors[anchors])
            self.memory.add_to_memory(rows, anchors, len(anchors))

    def loss(self):
        anchors, positives = self.corpus.batch()
        with torch.no_grad():
            keys = self.student(self.corpus.vectors[positives])
        encoded = torch.cat([self.student(self.corpus.vectors[anchors]), keys])
        rows = torch.cat([anchors, positives])
        return self.memory(encoded, rows, enqueue_mask=self.are_keys)


class Drawn(Whole):
    """Only the memory's storage; the loss sees positives, with gradient, and m drawn entries."""

    def loss(self):
        anchors, positives = self.corpus.batch()
        encoded = self.student(self.corpus.vectors[torch.cat([anchors, positives])])
        first, second = encoded.split(self.corpus.size)
        self.memory.add_to_memory(first, anchors, len(anchors))
        drawn = self.corpus.draw(self.memory.memory_size)
        allowed = self.corpus.allowed(anchors, self.memory.label_memory[drawn])
        negatives = self.memory.embedding_memory[drawn]
        return loss_of_pairs(self.memory.loss, first, second, negatives, allowed)


class Ours:
    def __init__(self, objective):
        self.objective, self.student, self.step = objective, objective.student, 0

    def fill(self):
        rng, size = np.random.default_rng(0), len(self.objective.queue)
        self.objective._push(rng.integers(self.objective.num_rows, size=size))

    def loss(self):
        self.step += 1
        return self.objective(None, self.step)[0]


def loss_of_pairs(loss, anchors, positives, negatives, allowed):
    """Their loss of explicit pairs: negatives [m, dim] where allowed [B, m]."""
    own, (anchor, place) = torch.arange(len(anchors)), torch.where(allowed)
    pairs = own, own, anchor, len(anchors) + place
    return loss(anchors, None, pairs, torch.cat([positives, negatives]))


def agreement(ours: Ours, corpus: Corpus, their_losses) -> float:
    """Print, and return, how far their losses are from ours on one step's outputs and pairs."""
    seen, mask_of = {}, ours.objective._mask

    def mask(*rows):
        seen.update(rows=map(torch.from_numpy, rows), mask=mask_of(*rows))
        return seen["mask"]

    hook = ours.student.register_forward_hook(lambda _m, _x, out: seen.update(out=out.detach()))
    ours.objective._mask = mask
    losses = {"ours": ours.loss().item()}
    hook.remove()
    del ours.objective._mask
    parts = seen["out"].split([corpus.size, corpus.size, corpus.num_negatives])
    allowed = ~torch.from_numpy(seen["mask"])
    losses |= {type(x).__name__: loss_of_pairs(x, *parts, allowed).item() for x in their_losses}
    differing = int((corpus.allowed(*seen["rows"]) != allowed).sum())
    print("loss of the same pairs:", ", ".join(f"{n} {x:.6f}" for n, x in losses.items()))
    print(f"pairs that only one side masks: {differing} of {allowed.numel():,}")
    return max(losses.values()) - min(losses.values())


def interleaved(calls, rounds: int):
    """Median seconds of each call by name, and the median over rounds of its ratio to the first."""
    seconds = {name: [] for name in calls}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, (call, repeats) in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if round_:
                seconds[name].append((time.perf_counter() - start) / repeats)
    first = next(iter(seconds.values()))
    ratios = {name: statistics.median(np.divide(x, first)) for name, x in seconds.items()}
    return {name: statistics.median(x) for name, x in seconds.items()}, ratios


def compare_steps(vectors, rounds: int) -> bool:
    rows = read_sheet(ROOT / "config/track_b.tsv")
    settings = next(row.settings for row in rows if row.name == "core_20k_seed0")
    found = nearest_to_each_other(vectors, settings["k"], settings["threshold"])
    student, corpus = build_student(settings, vectors, 0), Corpus(vectors, *found[:2], settings)
    kwargs = {"distance": DotProductSimilarity(normalize_embeddings=False)}  # outputs are unit
    kwargs |= {"temperature": settings["tau"], "reducer": MeanReducer()}
    ntxent, supcon = NTXentLoss(**kwargs), SupConLoss(**kwargs)
    objective = InfoNCE(copy.deepcopy(student), vectors, *found[1:], settings, 0)
    sides = {"ours": (Ours(objective), 5)}
    forms = ("CrossBatchMemory(NTXentLoss)", Whole, ntxent, 1), (
        "CrossBatchMemory(SupConLoss)", Whole, supcon, 1), (
        "SupConLoss, drawn by hand", Drawn, supcon, 5)  # fmt: skip
    for name, form, loss, repeats in forms:
        sides[name] = form(copy.deepcopy(student), corpus, loss, settings), repeats

    def stepper(side):
        side.fill()
        weights, rates = side.student.parameters(), {k: settings[k] for k in ("lr", "weight_decay")}
        optimizer = torch.optim.AdamW(weights, **rates)

        def step():
            side.loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    calls = {name: (stepper(side), repeats) for name, (side, repeats) in sides.items()}
    print(f"training step, {len(vectors):,} vectors, median of {rounds} rounds in turn")
    error = agreement(sides["ours"][0], corpus, (ntxent, supcon))
    seconds, ratios = interleaved(calls, rounds)
    for name, value in seconds.items():
        print(f"{name:30}{1 / value:8.2f} steps/s{ratios[name]:8.2f}")
    ratio = min(ratio for name, ratio in ratios.items() if name.startswith("CrossBatchMemory"))
    met = ratio >= STEP_RATIO and error <= LOSS_ERROR
    print(f"required of CrossBatchMemory: ratio >= {STEP_RATIO}, losses within {LOSS_ERROR:.0e}: "
          f"{'met' if met else 'NOT met'}")  # fmt: skip
    return met


def compare_neighbours(vectors, rounds: int, k: int = 50) -> bool:
    results = {}

    def ours():
        results["ours"] = nearest_to_each_other(vectors, k, 0.8)[:2]

    def theirs():
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        results["faiss"] = index.search(vectors, k + 1)

    seconds, ratios = interleaved({"ours": (ours, 1), "faiss": (theirs, 1)}, rounds)
    values, rows = results["faiss"]
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(1), -1] = True  # copies of it came first: the last one is too much
    values, rows = (x[~own].reshape(-1, k) for x in (values, rows))
    equal = (np.sort(rows) == np.sort(results["ours"][1])).all(1)
    tied = (np.abs(values - results["ours"][0]) <= TIE).all(1)
    print(f"neighbours, {vectors.shape}, k {k}, median of {rounds} rounds in turn")
    for name, value in seconds.items():
        print(f"{name:30}{value:8.3f} s      {ratios[name]:8.2f}")
    met = ratios["faiss"] >= SEARCH_RATIO and bool((equal | tied).all())
    print(f"equal sets: {equal.mean():.2%}; or the same similarities: {(equal | tied).mean():.2%}")
    print(f"required: ratio >= {SEARCH_RATIO}, all sets: {'met' if met else 'NOT met'}")
    return met


def synthetic(num: int, dim: int = 384):
    """Unit vectors in clusters of about 20, a few of them above the filter's threshold."""
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
    if args.synthetic is None and not (TEACHER / "vectors.npy").is_file():
        parser.error(f"no {TEACHER}: run the workflow, or give --synthetic N")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    found = load_vectors(TEACHER) if args.synthetic is None else {}
    both = synthetic(args.synthetic) if args.synthetic else None
    met = True
    if args.only != "neighbours":
        met &= compare_steps(both if args.synthetic else np.array(found["train"]), args.rounds)
    if args.only != "steps":
        chosen = synthetic(args.vectors) if args.vectors else both
        met &= compare_neighbours(np.array(found["all"]) if chosen is None else chosen, args.rounds)
    return int(args.check and not met)


if __name__ == "__main__":
    raise SystemExit(main())
