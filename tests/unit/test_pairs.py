"""Prompts and completions: records, tokens, windows and batches."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from commands import error_of

from kimi_recursive.data.corpus import prepare_corpus, read_documents
from kimi_recursive.data.settings import TaskSettings, TokenizerSettings
from kimi_recursive.data.tasks import Group, cycle, make_task, names, task_files
from kimi_recursive.data.tokens import TokenSplit, load_tokens, tokenize_corpus, train_tokenizer
from kimi_recursive.data.windows import IGNORED, ChunkSampler, document_windows

PAIRS = [
    {"prompt": "two and two is", "completion": " four", "group": "sums"},
    {"prompt": "three and one is", "completion": " four", "id": "x"},
    {"text": "four is a word"},
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def split_of(*sizes: tuple[int, int]) -> TokenSplit:
    """Pairs of so many tokens in prompt and completion, whose tokens are 0, 1, 2... over all."""
    offsets = np.append(0, np.cumsum([sum(size) for size in sizes])).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    prompts = np.array([prompt for prompt, _ in sizes], dtype=np.int64)
    ids = [f"p{i}" for i in range(len(sizes))]
    return TokenSplit(ids, tokens, offsets, prompts, ["g"] * len(sizes))


# Reading


def test_pairs_and_plain_text_are_read_from_one_file(tmp_path):
    frame = read_documents({"source": write(tmp_path / "a.jsonl", PAIRS)})
    assert frame["text"].to_list() == [
        "two and two is four", "three and one is four", "four is a word",
    ]  # fmt: skip
    assert frame["num_prompt_characters"].to_list() == [14, 16, None]
    assert frame["group"].to_list() == ["sums", None, None]
    assert frame["document_id"].to_list()[1] == "x"
    other = [{"q": r["prompt"], "a": r["completion"]} for r in PAIRS[:2]]
    fields = {"prompt_field": "q", "completion_field": "a"}
    named = read_documents({"source": write(tmp_path / "b.jsonl", other), **fields})
    assert named["num_prompt_characters"].to_list() == [14, 16]


def test_parquet_holds_pairs_too(tmp_path):
    pl.DataFrame(PAIRS[:1]).write_parquet(tmp_path / "a.parquet")
    frame = read_documents({"source": str(tmp_path / "a.parquet")})
    assert frame.select("text", "num_prompt_characters", "group").row(0) == (
        "two and two is four", 14, "sums",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": 3, "completion": "x"}, "a.jsonl:1: no string in field 'prompt' (prompt_field)"),
        ({"completion": "x"}, "a.jsonl:1: no string in field 'prompt'"),
        ({"prompt": "x", "completion": ["y"]}, "no string in field 'completion'"),
        ({"prompt": "x", "completion": "  "}, "a.jsonl:1: field 'completion' is blank"),
        ({"prompt": "x", "completion": "y", "group": [1]}, "field 'group' (group_field) must be"),
        ({"prompt": "x"}, "no string in field 'text' (text_field)"),
    ],
)
def test_a_bad_record_is_one_line_with_file_line_and_field(tmp_path, record, problem):
    message = error_of(read_documents, {"source": write(tmp_path / "a.jsonl", [record])})
    assert problem in message and "\n" not in message


def test_given_splits_are_taken_as_they_are_and_say_what_repeats(tmp_path):
    parts = {"train": PAIRS, "validation": PAIRS[:1], "test": PAIRS[1:2], "pretrain": PAIRS[2:]}
    for name, records in parts.items():
        write(tmp_path / f"{name}.jsonl", [{k: r[k] for k in r if k != "id"} for r in records])
    source = {name: str(tmp_path / f"{name}.jsonl") for name in parts}
    facts = prepare_corpus({"source": source}, tmp_path / "corpus")
    assert {name: part["num_documents"] for name, part in facts["splits"].items()} == {
        name: len(records) for name, records in parts.items()
    }
    assert facts["num_test_texts_in_train"] == facts["num_validation_texts_in_train"] == 1
    written = pl.read_parquet(tmp_path / "corpus/pretrain.parquet")
    assert written.columns == ["document_id", "text", "num_characters"], "no pair, no columns"


# Tokens


@pytest.fixture
def tokens_of(tmp_path):
    """Tokens of pairs, with a tokenizer of words."""

    def make(records=PAIRS, **options):
        source = dict.fromkeys(
            ("train", "validation", "test"), write(tmp_path / "a.jsonl", records)
        )
        prepare_corpus({"source": source}, tmp_path / "corpus")
        settings = TokenizerSettings(100, "word")
        train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", settings)
        folders = (tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens")
        facts = tokenize_corpus(*folders, **options)
        return load_tokens(tmp_path / "tokens", "test"), facts

    return make


def test_a_pair_is_bos_prompt_completion_eos_and_text_has_no_eos(tokens_of, tmp_path):
    from transformers import AutoTokenizer  # late: the tier imports nothing heavy

    split, facts = tokens_of()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    shown = [tokenizer.decode(split.document(i)) for i in range(3)]
    assert shown == [
        "<|bos|> two and two is four <|eos|>",
        "<|bos|> three and one is four <|eos|>",
        "<|bos|> four is a word",
    ]
    assert split.num_prompt.tolist() == [5, 5, 1]
    assert split.groups == ["sums", None, None]
    characters = sum(len(r.get("text", "")) or len(r["prompt"] + r["completion"]) for r in PAIRS)
    assert facts["splits"]["test"]["characters_per_token"] == characters / 14
    bare, _ = tokens_of(append_eos=False)
    assert tokenizer.decode(bare.document(0)) == "<|bos|> two and two is four"


def test_a_tokenizer_of_words_says_what_it_cannot_do(tokens_of, tmp_path):
    tokens_of()
    small = TokenizerSettings(9, "word")
    message = error_of(train_tokenizer, tmp_path / "corpus", tmp_path / "t", small)
    assert "8 different words" in message and "got 9" in message
    source = dict.fromkeys(
        ("train", "validation", "test"), write(tmp_path / "b.jsonl", [{"text": "five is new"}])
    )
    prepare_corpus({"source": source}, tmp_path / "corpus")
    folders = (tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "tokens")
    assert "b.jsonl:1: a word that the tokenizer" in error_of(tokenize_corpus, *folders)


# Windows and batches


def test_a_pair_is_one_window_on_the_grid_of_generation():
    split = split_of((4, 3), (9, 2))
    first, second = document_windows(split, 8, 1)
    assert first.inputs.tolist() == [0, 1, 2, 3, 4, 5] and first.chunk_start == 3
    assert first.targets[first.chunk_start :].tolist() == [4, 5, 6] and first.num_targets == 3
    # What does not fit is cut from the start of the prompt.
    assert second.inputs.tolist() == list(range(9, 17)) and second.start == 2
    assert second.targets[second.chunk_start :].tolist() == [16, 17]
    assert "p1: the completion has 2 tokens" in error_of(
        document_windows, split_of((3, 1), (3, 2)), 1, 1
    )


def test_every_chunk_of_every_completion_is_drawn_and_only_its_targets_count():
    width = 2
    split = split_of((4, 3), (2, 1), (3, 4))
    sampler = ChunkSampler(split, 6, 3000, 5, width)
    batch = sampler.batch(0)
    assert batch.chunk_start == 4 and batch.inputs.shape == (3000, 6)
    seen = {}
    for inputs, targets, mask in zip(batch.inputs, batch.targets, batch.mask, strict=True):
        counted = tuple(targets[targets != IGNORED].tolist())
        seen.setdefault(counted, []).append((inputs, mask))
        assert (targets[:4] == IGNORED).all(), "what is before the chunk is only read"
    completions = [(4, 5), (6,), (9,), (13, 14), (15, 16)]
    assert set(seen) == set(completions)
    shares = [len(seen[counted]) / 3000 for counted in completions]
    assert shares == pytest.approx([0.2] * 5, abs=0.04)
    inputs, mask = seen[(15, 16)][0]
    assert inputs.tolist() == [10, 11, 12, 13, 14, 15] and mask.all()
    inputs, mask = seen[(9,)][0]
    assert mask.tolist() == [False] * 3 + [True] * 3, "padded on the left"
    assert inputs[mask].tolist() == [7, 8, 0], "the chunk starts with the last prompt token"


def test_a_base_reads_whole_pairs_and_learns_their_completions():
    sampler = ChunkSampler(split_of((4, 3), (2, 1)), 8, 50, 0, None)
    batch = sampler.batch(0)
    rows = {tuple(r) for r in np.concatenate([batch.inputs, batch.targets], axis=1).tolist()}
    none = IGNORED
    assert rows == {
        (0, 1, 2, 3, 4, 5, none, none, none, 4, 5, 6),
        (7, 8, 0, 0, 0, 0, none, 9, none, none, none, none),
    }
    assert batch.mask is None and batch.chunk_start == 0


# Tasks


def test_names_differ_and_a_cycle_visits_everyone():
    people = names(6000, 0)
    assert len(set(people)) == 6000 and people == names(6000, 0) != names(6000, 1)
    successor = cycle(50, np.random.default_rng(0))
    walk = [0]
    while len(walk) < 50:
        walk.append(int(successor[walk[-1]]))
    assert sorted(walk) == list(range(50)) and successor[walk[-1]] == 0


def test_facts_ask_seen_and_unseen_people(tmp_path):
    task = TaskSettings("facts", 64, [2], 3, 1, 8, 0)
    counts = make_task(task, tmp_path / "task")
    assert counts == {"pretrain": 64 + 2 * 32, "train": 32, "validation": 8, "test": 2 * 3 * 8}
    records = {split: read(path) for split, path in task_files(tmp_path / "task").items()}
    taught = {
        r["prompt"].split()[-1]: r["completion"].strip()
        for r in records["pretrain"]
        if r["group"] == "seen, 1 hop"
    }
    assert len(taught) == 64
    for split in ("train", "validation", "test"):
        for record in records[split]:
            person, hops = record["prompt"].split()[-1], record["prompt"].lower().count("taught")
            group = Group.parse(record["group"])
            assert group is not None and group.hops == hops
            for _ in range(hops):
                person = taught[person]
            assert record["completion"] == f" {person}"
    asked = {split: {r["prompt"].split()[-1] for r in records[split]} for split in records}
    in_steps = {r["prompt"].split()[-1] for r in records["pretrain"] if "who" in r["prompt"]}
    unseen = {r["prompt"].split()[-1] for r in records["test"] if "unseen" in r["group"]}
    assert in_steps == asked["train"], "more than one fact is asked of seen people alone"
    assert not unseen & (asked["train"] | asked["validation"])
    chain = next(r for r in records["pretrain"] if r["group"] == "seen, 3 hops")
    first = taught[chain["prompt"].split()[-1]]
    assert chain["completion"].split() == [first, taught[first], taught[taught[first]]]
    again = make_task(task, tmp_path / "again")
    assert again == counts
    for path, other in zip(
        task_files(tmp_path / "task").values(), task_files(tmp_path / "again").values(), strict=True
    ):
        assert read(path) == read(other)
    small = TaskSettings("facts", 16, [2], 3, 1, 8, 0)
    assert "raise num_entities" in error_of(make_task, small, tmp_path / "small")


def test_facts_can_be_asked_for_by_their_number(tmp_path):
    task = TaskSettings("facts", 64, [2, 3], 3, 1, 8, 0, asks_by_number=True)
    counts = make_task(task, tmp_path / "task")
    assert counts == {"pretrain": 64 + 8, "train": 2 * 32, "validation": 2 * 8, "test": 2 * 3 * 8}
    records = {split: read(path) for split, path in task_files(tmp_path / "task").items()}
    counting = [r for r in records["pretrain"] if r["group"] == "counting"]
    assert {r["prompt"] + r["completion"] for r in counting} == {
        "one two three four", "two three four", "three four",
    }  # fmt: skip
    facts = [r for r in records["pretrain"] if r not in counting]
    assert all(r["prompt"].startswith("Who is one above ") for r in facts)
    taught = {r["prompt"].split()[-1]: r["completion"].strip() for r in facts}
    for record in records["train"] + records["test"]:
        person, hops = record["prompt"].split()[-1], Group.parse(record["group"]).hops
        said = ["one", " ".join(["two"] * 8), " ".join(["three"] * 8)][hops - 1]
        assert record["prompt"] == f"Who is {said} above {person}"
        for _ in range(hops):
            person = taught[person]
        assert record["completion"] == f" {person}"
    deep = TaskSettings("facts", 64, [2], 10, 1, 8, 0, asks_by_number=True)
    assert "at most 9 with asks_by_number, got 10" in error_of(make_task, deep, tmp_path / "deep")


def test_pointers_can_be_answered_from_the_prompt(tmp_path):
    make_task(TaskSettings("pointers", 5, [1, 2], 3, 7, 4, 0), tmp_path / "task")
    for record in read(tmp_path / "task/test.jsonl"):
        told, question = record["prompt"].split(". After ")
        to = dict(entry.split(" to ") for entry in told.split(". "))
        hops, person = question.split(" from ")
        for _ in range(int(hops)):
            person = to[person]
        assert record["completion"] == f" {person}"


@pytest.mark.parametrize("text", ["seen, 1 hop", "unseen, 3 hops"])
def test_a_group_is_its_text(text):
    assert str(Group.parse(text)) == text
    assert Group.parse(text + "!") is None and Group.parse("other") is None
