"""Corpora of prompts and completions that are made by a rule, from a seed.

`facts`, closed book: every person has one teacher, along a random cycle. `pretrain` asks who taught
each person, and of the *seen* half also questions such as "Who taught who taught Ada", answered
step by step: first Ada's teacher, then the teacher's. The other splits want the last answer at
once. `train` asks about seen people; those of `validation` and the *unseen* ones of `test` are in
no question of more than one fact. With `asks_by_number` a question says how many facts it asks for
("Who is two ... two above Ada", with the number eight times), and `pretrain` has questions of one
fact only, and lines that count: so a frozen base does not learn to ignore the numbers.

`pointers`, in context: the prompt tells who passes the ball to whom, and asks who has it after so
many passes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_recursive.data.corpus import SPLITS
from kimi_recursive.data.settings import PRETRAIN, TaskSettings
from kimi_recursive.files import publishing

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
TIMES_SAID = 8  # a number, in a question that asks for so many facts
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]


@dataclass(frozen=True)
class Group:
    """What a question of a task is scored with.

    Attributes:
        entities: `seen` or `unseen` in training.
        hops: How many facts the answer needs.
    """

    entities: str
    hops: int

    def __str__(self) -> str:
        return f"{self.entities}, {self.hops} hop{'s' * (self.hops > 1)}"

    @classmethod
    def parse(cls, text: str) -> Group | None:
        """The group that `str` gives, or None when the text is another group's."""
        entities, _, rest = text.partition(", ")
        number = rest.partition(" ")[0]
        found = cls(entities, int(number)) if number.isdigit() else None
        return found if str(found) == text else None


def names(number: int, seed: int) -> list[str]:
    """Different made-up names of two or more syllables, in random order."""
    count, length = len(SYLLABLES) ** 2, 2
    while count < number:
        count, length = count * len(SYLLABLES), length + 1
    chosen = np.random.default_rng([seed, 0]).choice(count, number, replace=False)
    digits = [[(n // len(SYLLABLES) ** i) % len(SYLLABLES) for i in range(length)] for n in chosen]
    return ["".join(SYLLABLES[d] for d in word).capitalize() for word in digits]


def cycle(number: int, generator: np.random.Generator) -> np.ndarray:
    """A random permutation int64 [number] that is one cycle (Sattolo, 1986)."""
    order = generator.permutation(number)
    successor = np.empty(number, dtype=np.int64)
    successor[order] = np.roll(order, -1)
    return successor


def follow(successor: np.ndarray, start: int, hops: int) -> int:
    """Where `hops` steps lead."""
    for _ in range(hops):
        start = int(successor[start])
    return start


def make_task(settings: TaskSettings, output_dir: Path) -> dict[str, int]:
    """Write `{pretrain,train,validation,test}.jsonl`, all or nothing: a prompt, a completion and a
    group a line.

    Returns: the number of questions of each split.

    Raises:
        ValueError: too few people for the splits.
    """
    make = {"facts": _facts, "pointers": _pointers}[settings.kind]
    with publishing(output_dir) as folder:
        counts = {}
        for split, records in make(settings).items():
            lines = [json.dumps(record) for record in records]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            counts[split] = len(lines)
    return counts


def task_files(folder: Path) -> dict[str, str]:
    """The files that `make_task` writes, by split, as `corpus.source`."""
    return {split: str(folder / f"{split}.jsonl") for split in (PRETRAIN, *SPLITS)}


def _facts(task: TaskSettings) -> dict[str, list[dict[str, str]]]:
    generator = np.random.default_rng([task.seed, 1])
    people, taught_by = names(task.num_entities, task.seed), cycle(task.num_entities, generator)
    order = generator.permutation(task.num_entities)
    half = task.num_entities // 2
    held_out = half // 4
    seen, validation, unseen = order[:half], order[half : half + held_out], order[half + held_out :]
    if len(unseen) < task.num_test or len(seen) < task.num_test:
        raise ValueError(
            f"corpus.task.num_test: {task.num_test} is more than the "
            f"{min(len(seen), len(unseen))} people of a group; raise num_entities"
        )

    if task.asks_by_number and task.max_hops >= len(NUMBERS):
        raise ValueError(
            f"corpus.task.max_hops: at most {len(NUMBERS) - 1} with asks_by_number, "
            f"got {task.max_hops}"
        )

    def question(name: str, hops: int) -> str:
        if task.asks_by_number:
            said = " ".join([NUMBERS[hops - 1]] * (1 if hops == 1 else TIMES_SAID))
            return f"Who is {said} above {name}"
        return "Who taught " + "who taught " * (hops - 1) + name

    def ask(
        who: Sequence[int], entities: str, hops: Sequence[int], in_steps: bool = False
    ) -> list[dict[str, str]]:
        def answer(x: int, h: int) -> str:
            steps = range(1 if in_steps else h, h + 1)
            return "".join(f" {people[follow(taught_by, x, step)]}" for step in steps)

        return [
            {
                "prompt": question(people[x], h),
                "completion": answer(x, h),
                "group": str(Group(entities, h)),
            }
            for h in hops
            for x in who
        ]

    every = range(1, task.max_hops + 1)
    more = _counting(task) if task.asks_by_number else ask(list(seen), "seen", every[1:], True)
    return {
        PRETRAIN: ask(list(order), "seen", [1]) + more,
        "train": ask(list(seen), "seen", task.train_hops),
        "validation": ask(list(validation), "unseen", task.train_hops),
        "test": ask(list(seen[: task.num_test]), "seen", every)
        + ask(list(unseen[: task.num_test]), "unseen", every),
    }


def _counting(task: TaskSettings) -> list[dict[str, str]]:
    """Lines that count to one more than `max_hops`, an eighth as many as people."""
    words = NUMBERS[: task.max_hops + 1]
    starts = [i % task.max_hops for i in range(task.num_entities // 8)]
    return [
        {
            "prompt": words[i],
            "completion": "".join(f" {word}" for word in words[i + 1 :]),
            "group": "counting",
        }
        for i in starts
    ]


def _pointers(task: TaskSettings) -> dict[str, list[dict[str, str]]]:
    people = names(task.num_entities, task.seed)
    generator = np.random.default_rng([task.seed, 2])

    def asked(number: int, entities: str, hops: Sequence[int]) -> Iterator[dict[str, str]]:
        for h in hops:
            for _ in range(number):
                to, order = cycle(len(people), generator), generator.permutation(len(people))
                start = int(generator.integers(len(people)))
                told = ". ".join(f"{people[x]} to {people[to[x]]}" for x in order)
                yield {
                    "prompt": f"{told}. After {h} from {people[start]}",
                    "completion": f" {people[follow(to, start, h)]}",
                    "group": str(Group(entities, h)),
                }

    every = range(1, task.max_hops + 1)
    return {
        PRETRAIN: list(asked(task.num_pairs, "seen", [1])),
        "train": list(asked(task.num_pairs, "seen", task.train_hops)),
        "validation": list(asked(task.num_test, "unseen", task.train_hops)),
        "test": list(asked(task.num_test, "unseen", every)),
    }
