"""Reading documents: every kind of source, and what is refused."""

import json
import sys
import types
from pathlib import Path

import polars as pl
import pytest
from commands import error_of, write

from kimi_recursive.data.corpus import prepare_corpus, read_documents


def test_every_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("in/b.txt"), b"\xef\xbb\xbfline one\r\nline two")
    write(Path("in/sub/a.TXT"), "second")
    write(Path("in/c.jsonl"), '{"text": "x\\u2028y", "id": 7}\n\n  \n{"text": "z", "id": null}\n')
    pl.DataFrame({"document_id": ["p", None], "text": ["from p", "from q"]}).write_parquet(
        "in/d.parquet"
    )
    write(Path("in/readme.md"), "skipped in a directory")
    write(Path("in/.hidden/no.txt"), "skipped, hidden")
    expected = {
        "in/b.txt": "line one\r\nline two",
        "7": "x\u2028y",
        "in/c.jsonl:4": "z",
        "p": "from p",
        "in/d.parquet:2": "from q",
        "in/sub/a.TXT": "second",
    }
    Path("in/directory.txt").mkdir()
    frame = read_documents({"source": "in"})
    assert frame.schema == {"document_id": pl.String, "text": pl.String}
    assert list(frame.iter_rows()) == list(expected.items())
    pattern = read_documents({"source": ["in/**/*.TXT", "in/b.txt", "in/*.t*"]})
    assert pattern["document_id"].to_list() == ["in/sub/a.TXT", "in/b.txt"]


def test_text_field_and_duplicates_and_blanks(tmp_path):
    rows = [{"body": "a", "id": "x"}, {"body": "b"}, {"body": "a"}, {"body": " \n"}]
    source = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    frame = read_documents({"source": source, "text_field": "body"})
    assert list(frame.iter_rows()) == [("x", "a"), (f"{source}:2", "b")]
    rows += [{"body": "c"}]
    write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    summary = prepare_corpus({"source": source, "text_field": "body"}, tmp_path / "out")
    assert (summary["dropped_duplicates"], summary["dropped_blank"]) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ["a.jsonl:2", "not valid JSON", "Expecting"]),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', ["a.jsonl:3", "'text'", "body"]),
        ("a.jsonl", '{"text": 5}', ["a.jsonl:1", "no string in field 'text'", "5"]),
        ("a.jsonl", '["text"]', ["a.jsonl:1", "'text'"]),
        ("a.jsonl", "null", ["a.jsonl:1", "'text'"]),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', ["a.jsonl:2", "surrogates"]),
        ("a.jsonl", "[" * 100_000, ["a.jsonl:1", "not valid JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["a.jsonl:2", "utf-8", "0xff"]),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), ["a.jsonl:1", "utf-8"]),
        ("a.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": "1"}', [":2: id '1'", ":1"]),
        ("a.jsonl", "", ["a.jsonl", "0 documents"]),
        ("a.jsonl", '{"text": " "}\n{"text": "\\n"}', ["a.jsonl", "2 documents, none with text"]),
        ("a.txt", b"ok\n\xe9t\xe9", ["a.txt", "utf-8", "0xe9", "position 3"]),
        ("a.txt", "  \n", ["a.txt", "1 documents, none with text"]),
        ("a.csv", "text\na", ["a.csv", "unknown suffix", ".txt, .jsonl, .parquet"]),
        ("a.parquet", "not parquet", ["a.parquet", "arquet"]),
    ],
)
def test_message_for_a_bad_file(tmp_path, name, content, parts):
    message = error_of(read_documents, {"source": write(tmp_path / name, content)})
    assert all(part in message for part in parts), message


def test_message_for_a_bad_source(tmp_path, monkeypatch):
    missing = str(tmp_path / "missing.txt")
    assert f"{missing}: no such file" in error_of(read_documents, {"source": missing})
    pattern = str(tmp_path / "*.txt")
    assert f"{pattern}: no such file" in error_of(read_documents, {"source": [pattern]})
    assert "no such file" in error_of(read_documents, {"source": str(tmp_path)})
    assert "source" in error_of(read_documents, {"source": 3})
    assert "source" in error_of(read_documents, {})
    assert "0 documents" in error_of(read_documents, {"source": []})
    path = tmp_path / "n.parquet"
    pl.DataFrame({"text": [1, 2]}).write_parquet(path)
    assert f"{path}:1: no string in field 'text'" in error_of(read_documents, {"source": path})
    message = error_of(read_documents, {"source": path, "text_field": "body"})
    assert f"{path}:1: no string in field 'body'" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = error_of(read_documents, {"source": "datasets:owner/name"})
    assert "datasets:owner/name" in message and "datasets" in message.split(":")[-1]


def test_hugging_face_datasets(monkeypatch):
    def load_dataset(name, split):
        if name != "owner/name":
            raise FileNotFoundError("no dataset\nof that name")
        return [{"t": f"{split} a", "id": 4}, {"t": f"{split} b"}]

    library = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    corpus = {"source": "datasets:owner/name", "text_field": "t"}
    expected = [("4", "train a"), ("datasets:owner/name:2", "train b")]
    assert list(read_documents(corpus).iter_rows()) == expected
    message = error_of(read_documents, {"source": "datasets:other"})
    assert message == "corpus.source: datasets:other: no dataset of that name"
