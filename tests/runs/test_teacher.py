"""Sentences and teachers: what is taken, in which order, and what is refused."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from commands import error_of
from safetensors.torch import save_file
from track_b import TEACHER, clustered_vectors

from kimi_recursive.track_b import teacher
from kimi_recursive.track_b.sentences import prepare_sentences, split_sentences
from kimi_recursive.track_b.teacher import encode_sentences, import_vectors, load_vectors

MINILM = {
    "kind": "minilm", "path": None, "hub_id": None, "revision": None, "trust_remote_code": False,
    "max_length": None, "batch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One is here. Two is there! Three?", ["One is here.", "Two is there!", "Three?"]),
        ("It went to Mr. Adams. He left.", ["It went to Mr. Adams.", "He left."]),
        ("James K. Polk read No. 4. He sat.", ["James K. Polk read No. 4.", "He sat."]),
        ('He said "Stop." Then he went.', ['He said "Stop."', "Then he went."]),
        ("a line\nthat goes on. And ends", ["a line that goes on.", "And ends"]),
        ("A HEADING\n\nThe text.", ["A HEADING", "The text."]),
        ("It cost 3.50, e.g. for a mr. No more.", ["It cost 3.50, e.g. for a mr.", "No more."]),
        ("Ends with Mr.\n\nA new paragraph.", ["Ends with Mr.", "A new paragraph."]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert split_sentences(text) == expected


@pytest.fixture
def corpus(tmp_path):
    for i in range(3):
        lines = [f"Sentence number {i * 20 + n} has these words." for n in range(20)]
        lines += ["Too short here.", "The Same In All three.", "the same in all three."]
        (tmp_path / f"{i}.txt").write_text(" ".join(lines))
    return {"source": str(tmp_path / "*.txt"), "text_field": "text"}


def test_they_are_drawn_by_a_hash_so_that_fewer_are_the_first_of_more(corpus, tmp_path):
    tables = []
    for name, number in (("all", None), ("half", 30)):
        prepare_sentences(corpus, number, 5, 6, 0, tmp_path / f"{name}.parquet")
        tables.append(pl.read_parquet(tmp_path / f"{name}.parquet"))
    everything, half = tables
    assert everything.height == 61, "60 and one that is there in two spellings; no short ones"
    assert half.height == 30 and set(half["sentence"]) <= set(everything["sentence"])
    for table in tables:
        splits = table["split"].to_list()
        assert splits == ["train"] * (table.height - 11) + ["validation"] * 5 + ["test"] * 6
        assert table["sentence"].n_unique() == table.height
        assert set(table["document_id"]) <= {str(tmp_path / f"{i}.txt") for i in range(3)}
    for split in ("validation", "test"):
        assert half.filter(split=split)["sentence"].equals(
            everything.filter(split=split)["sentence"]
        )
    prepare_sentences(corpus, None, 5, 6, 1, tmp_path / "other.parquet")
    other = pl.read_parquet(tmp_path / "other.parquet")
    assert set(other["sentence"]) == set(everything["sentence"])
    assert not other["sentence"].equals(everything["sentence"])


def test_extra_sentences_are_trained_on_and_leave_database_and_queries_as_they_are(
    corpus, tmp_path
):
    paths = [tmp_path / f"{name}.parquet" for name in ("plain", "some", "rest")]
    for path, extra in zip(paths, (0, 9, None), strict=True):
        prepare_sentences(corpus, 30, 5, 6, 0, path, num_extra_sentences=extra)
    plain, some, rest = map(pl.read_parquet, paths)
    assert some["split"].to_list() == ["extra"] * 9 + plain["split"].to_list()
    assert some[9:].equals(plain) and rest.height == 61 and rest[31:].equals(plain)
    assert some["sentence"].n_unique() == 39 and set(some["sentence"]) <= set(rest["sentence"])
    message = error_of(prepare_sentences, corpus, 30, 5, 6, 0, paths[0], num_extra_sentences=32)
    assert "62 distinct sentences" in message and "the corpus has 61" in message


def test_too_few_sentences(corpus, tmp_path):
    message = error_of(prepare_sentences, corpus, 62, 5, 6, 0, tmp_path / "x.parquet")
    assert "62 distinct sentences" in message and "the corpus has 61" in message
    assert "has 61" in error_of(prepare_sentences, corpus, None, 30, 31, 0, tmp_path / "x.parquet")
    (tmp_path / "d").mkdir()
    for i in range(9):
        (tmp_path / f"d/{i}.txt").write_text(f"Always the very same sentence.{' ' * i}")
    same = {"source": str(tmp_path / "d"), "text_field": "text"}
    message = error_of(prepare_sentences, same, None, 10, 10, 0, tmp_path / "x.parquet")
    assert "the corpus has 1" in message
    assert not (tmp_path / "x.parquet").exists()


def write(path, vectors):
    if path.suffix == ".npy":
        np.save(path, vectors)
    elif path.suffix == ".safetensors":
        save_file({"embeddings": torch.from_numpy(vectors), "other": torch.zeros(2, 2)}, path)
    else:
        pl.DataFrame({"id": range(len(vectors)), "v": vectors.tolist()}).write_parquet(path)
    return {**TEACHER, "path": str(path)}


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_vectors_of_the_user_are_shuffled_normalised_and_each_taken_once(tmp_path, suffix):
    vectors = clustered_vectors(50, 6)
    vectors[7] = vectors[3]
    settings = write(tmp_path / f"v{suffix}", vectors)
    import_vectors(settings, None, 10, 11, 0, tmp_path / "teacher")
    found = load_vectors(tmp_path / "teacher")
    rows = pl.read_parquet(tmp_path / "teacher/rows.parquet")
    assert {name: len(part) for name, part in found.items()} == {
        "extra": 0, "train": 28, "validation": 10, "test": 11, "database": 49, "pool": 28,
    }  # fmt: skip
    assert sorted(rows["row"]) == [i for i in range(50) if i != 7]
    expected = vectors[rows["row"].to_numpy()]
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(found["database"] - expected).max() < 1e-6
    import_vectors(settings, 30, 10, 11, 0, tmp_path / "fewer")
    fewer = load_vectors(tmp_path / "fewer")
    assert len(fewer["database"]) == 30 and np.array_equal(fewer["test"], found["test"])
    facts = json.loads((tmp_path / "teacher/teacher.json").read_text())
    assert (facts["dim"], facts["num_train"], facts["kind"]) == (6, 28, "vectors")


def test_loaded_vectors_are_the_mapped_file_and_no_copy(tmp_path):
    settings = write(tmp_path / "v.npy", clustered_vectors(50, 6))
    import_vectors(settings, 40, 10, 11, 0, tmp_path / "teacher", num_extra_sentences=None)
    found = load_vectors(tmp_path / "teacher")
    whole = found["database"].base
    assert isinstance(whole.base, np.memmap) and not found["database"].flags.writeable
    for part in found.values():
        assert type(part) is np.ndarray and part.flags.c_contiguous
        assert np.shares_memory(part, whole)


def test_vectors_that_are_refused(tmp_path):
    def refused(vectors, name="v.npy"):
        settings = write(tmp_path / name, vectors)
        message = error_of(import_vectors, settings, None, 10, 10, 0, tmp_path / "teacher")
        assert name in message and not (tmp_path / "teacher").exists()
        return message

    good = clustered_vectors(30, 4)
    bad = good.copy()
    bad[4, 1] = np.nan
    bad[9, 0] = np.inf
    message = refused(bad)
    assert "NaN or infinity (2 such)" in message and ("row 4 " in message or "row 9 " in message)
    bad = good.copy()
    bad[11] = 0
    assert "row 11 has a vector with length zero (1 such)" in refused(bad)
    message = refused(good[:1].repeat(30, 0))
    assert "22 distinct vectors are needed" in message and "it has 1 in 30 rows" in message
    bad = good.copy()
    bad[5:20] = bad[4]
    bad[2], bad[3] = np.nan, 0
    message = refused(bad)
    assert "row 3 has a vector with length zero (1 such); row 2 has a vector with NaN" in message
    assert "22 distinct vectors are needed (20 of them queries), but it has 15 in 30" in message
    assert "must be a matrix of floats, got int64" in refused(np.ones((30, 4), dtype=np.int64))
    assert "must be a matrix" in refused(good[0])
    ragged = pl.DataFrame({"v": [[1.0, 2.0], [1.0]] * 20})
    ragged.write_parquet(tmp_path / "r.parquet")
    settings = {**TEACHER, "path": str(tmp_path / "r.parquet")}
    assert "different lengths" in error_of(
        import_vectors, settings, None, 10, 10, 0, tmp_path / "t"
    )
    for name, content in {"x.npy": b"no", "x.parquet": b"no", "x.safetensors": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        settings = {**TEACHER, "path": str(tmp_path / name)}
        assert "not readable" in error_of(import_vectors, settings, None, 10, 10, 0, tmp_path / "t")
    settings = {**TEACHER, "path": str(tmp_path / "x.csv")}
    assert "ends in .npy" in error_of(import_vectors, settings, None, 10, 10, 0, tmp_path / "t")


@pytest.fixture
def three_sentences(tmp_path):
    texts = [
        "The army needs more ships.",
        "The navy needs more vessels.",
        "Taxes were lowered again.",
    ]
    table = pl.DataFrame(
        {"sentence": texts, "document_id": list("abc"), "split": ["train", "validation", "test"]}
    )
    table.write_parquet(tmp_path / "sentences.parquet")
    return tmp_path / "sentences.parquet"


def test_the_real_teacher_from_its_package_and_from_a_directory(three_sentences, tmp_path):
    encode_sentences(MINILM, three_sentences, tmp_path / "teacher", tmp_path / "work")
    found = load_vectors(tmp_path / "teacher")["database"]
    assert found.shape == (3, 384) and np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
    assert found[0] @ found[1] > 0.5 > found[0] @ found[2], "a paraphrase is near, the rest far"
    facts = json.loads((tmp_path / "teacher/teacher.json").read_text())
    assert facts["digest"] == teacher.PACKAGE_SHA256 and facts["name"] == "all-MiniLM-L6-v2"
    folder, _ = teacher._locate(MINILM)
    local = {**MINILM, "kind": "pretrained", "path": folder}
    encode_sentences(local, three_sentences, tmp_path / "local", tmp_path / "work2")
    assert np.array_equal(load_vectors(tmp_path / "local")["database"], found)
    short = {**local, "max_length": 3}
    encode_sentences(short, three_sentences, tmp_path / "short", tmp_path / "work2")
    assert not np.allclose(load_vectors(tmp_path / "short")["database"], found)


def test_a_teacher_that_is_not_the_pinned_one(three_sentences, tmp_path, monkeypatch):
    arguments = (three_sentences, tmp_path / "teacher", tmp_path / "work")
    monkeypatch.setattr(teacher, "PACKAGE_SHA256", "0" * 64)
    message = error_of(encode_sentences, MINILM, *arguments)
    assert "sha256 must be 000" in message and "got 53aa5117" in message
    monkeypatch.setattr(teacher, "PACKAGE_VERSION", "0.2.0")
    assert "version 0.2.0 is needed, but 0.1.0 is installed" in error_of(
        encode_sentences, MINILM, *arguments
    )
    monkeypatch.setattr(teacher, "PACKAGE", "no-such-package")
    assert "pip install no-such-package" in error_of(encode_sentences, MINILM, *arguments)
    (tmp_path / "empty").mkdir()
    pretrained = {**MINILM, "kind": "pretrained", "path": str(tmp_path / "empty")}
    assert "not a sentence-transformers model" in error_of(encode_sentences, pretrained, *arguments)
    assert not (tmp_path / "teacher").exists()


def test_encoding_resumes_after_the_last_whole_block(tmp_path, monkeypatch):
    texts = [f"text {i}" for i in range(10)]
    splits = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    pl.DataFrame({"sentence": texts, "split": splits}).write_parquet(tmp_path / "s.parquet")
    monkeypatch.setattr(teacher, "BLOCK", 3)
    monkeypatch.setattr(teacher, "_locate", lambda settings: ("fake", settings["digest"]))
    encoded, left = [], [5]

    def load(_path, _settings):
        def encode(part):
            encoded.extend(part)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return np.array([[int(text.split()[1]) + 1.0, 1.0] for text in part], np.float32)

        return encode, 2

    monkeypatch.setattr(teacher, "_load_encoder", load)
    left[0] = 3
    arguments = (tmp_path / "s.parquet", tmp_path / "teacher", tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        encode_sentences({**MINILM, "digest": "a"}, *arguments)
    assert encoded == texts[:9] and not (tmp_path / "teacher").exists()
    encoded.clear()
    left[0] = 99
    encode_sentences({**MINILM, "digest": "a"}, *arguments)
    assert encoded == texts[6:], "two blocks were whole"
    expected = np.array([[i + 1.0, 1.0] for i in range(10)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.abs(load_vectors(tmp_path / "teacher")["database"] - expected).max() < 1e-6
    encoded.clear()
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        encode_sentences({**MINILM, "digest": "a"}, *arguments)
    encoded.clear()
    left[0] = 99
    encode_sentences({**MINILM, "digest": "b"}, *arguments)
    assert encoded == texts, "another teacher starts afresh"


def test_extra_vectors_are_in_the_pool_and_not_in_the_database(tmp_path):
    np.save(tmp_path / "v.npy", clustered_vectors(60))
    settings = {**TEACHER, "path": str(tmp_path / "v.npy")}
    import_vectors(settings, 40, 5, 6, 0, tmp_path / "plain")
    import_vectors(settings, 40, 5, 6, 0, tmp_path / "extra", num_extra_sentences=None)
    plain, extra = load_vectors(tmp_path / "plain"), load_vectors(tmp_path / "extra")
    assert np.array_equal(extra["database"], plain["database"]) and len(plain["database"]) == 40
    assert np.array_equal(plain["pool"], plain["train"]) and plain["extra"].shape == (0, 24)
    assert len(extra["extra"]) == 20 and len(extra["pool"]) == 49
    assert np.array_equal(extra["pool"][20:], plain["train"])
    everything = np.concatenate([extra["extra"], extra["database"]])
    assert len(np.unique(everything, axis=0)) == 60, "none is in both"
    assert json.loads((tmp_path / "extra/teacher.json").read_text())["num_extra"] == 20
    message = error_of(
        import_vectors, settings, 40, 5, 6, 0, tmp_path / "x", num_extra_sentences=21
    )
    assert "61 distinct vectors" in message and "num_extra_sentences: null" in message
