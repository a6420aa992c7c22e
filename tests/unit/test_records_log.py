"""Logs of JSON lines: what is read, what is refused, what appending keeps."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import error_of
from guide_records import BASELINE, TRAINING, baseline, training

from kimi_recursive.records import (
    BASELINES,
    TRAINING_LOG,
    append_records,
    read_lines,
    read_records,
    validate,
)
from kimi_recursive.records import log as log_module
from kimi_recursive.records.kinds import problems


def write(path: Path, *lines) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


# ---- the schemas ----


@pytest.mark.parametrize("record, kind", [(TRAINING, TRAINING_LOG), (BASELINE, BASELINES)])
def test_the_guides_examples_are_valid_with_null_in_every_optional_field(record, kind):
    assert problems(record, kind) == []
    for required in ("", "run_data."):
        part = record.get(required.rstrip("."), {}) if required else record
        for key in part:
            if f"{required}{key}" in (*_required(kind), "metrics"):
                continue
            nulled = json.loads(json.dumps(record))
            (nulled["run_data"] if required else nulled)[key] = None
            expected = ["metrics"] if key == "metrics" else []
            assert problems(nulled, kind) == expected, key


def _required(kind) -> list[str]:
    inner = kind.schema["properties"].get("run_data", {}).get("required", [])
    return [*kind.schema["required"], *(f"run_data.{name}" for name in inner)]


@pytest.mark.parametrize("record, kind", [(TRAINING, TRAINING_LOG), (BASELINE, BASELINES)])
def test_every_required_field_is_missed_by_its_name(record, kind):
    for field in _required(kind):
        lacking = json.loads(json.dumps(record))
        owner = lacking["run_data"] if field.startswith("run_data.") else lacking
        del owner[field.removeprefix("run_data.")]
        if field != "run_data":  # without it the record would be a baseline's
            assert problems(lacking, kind) == [f"{field}: is missing"]


@pytest.mark.parametrize(
    "change, where",
    [
        ({"status": "done"}, "run_data.status"),
        ({"run_id": ""}, "run_data.run_id"),
        ({"run_id": 7}, "run_data.run_id"),
        ({"best_val_loss": "low"}, "run_data.best_val_loss"),
        ({"hyperparameters": {"seed": 1.5}}, "run_data.hyperparameters.seed"),
        ({"final_metrics": {"accuracy": [1]}}, "run_data.final_metrics.accuracy"),
        ({"start_time": "yesterday"}, "run_data.start_time"),
        ({"end_time": "2025-13-01T00:00:00"}, "run_data.end_time"),
    ],
)
def test_wrong_types_and_times_are_named(change, where):
    [problem] = problems(training("a", **change), TRAINING_LOG)
    assert problem.startswith(f"{where}: ")


def test_every_field_of_the_schemas_is_described():
    for kind in (TRAINING_LOG, BASELINES):
        text = json.dumps(kind.schema)
        assert kind.schema["$schema"].endswith("2020-12/schema") and len(kind.fields) > 30
        assert text.count('"description"') >= len(kind.fields) - 6  # ids, status, containers


# ---- reading ----


def test_records_of_older_code_are_read(tmp_path):
    lines = [
        '{"timestamp": "2025-10-21T00:00:00", "run_data": {"run_id": "a", "best_val_loss": NaN}}',
        "",
        '\t{"timestamp": "2025-10-21 00:00:00+02:00", "run_data": null}  \r',
    ]
    path = write(tmp_path / "log.jsonl", *lines)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    first, second = read_lines(path)
    assert first.record["run_data"] == {"run_id": "a", "best_val_loss": None}
    assert first.record["non_finite"] == ["run_data.best_val_loss"]
    assert first.problem == "NaN or infinity is not JSON: run_data.best_val_loss"
    assert (second.number, second.problem) == (3, "")


def test_validation_names_every_bad_line(tmp_path):
    path = write(
        tmp_path / "log.jsonl",
        training("a"),
        "{not json}",
        training("b", status="running"),
        training("b"),  # how the run ended: no duplicate
        training("a", best_val_loss=1.0),
        {"timestamp": "2025-10-21T00:00:00Z", "run_data": {"run_id": "c"}},
        "[1, 2]",
        baseline("d"),
        '{"timestamp": "2025-10-21T00:00:00Z", "run',
    )
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    num_records, found = validate(path)
    assert num_records == 6
    assert [problem.split(": ")[0] for problem in found] == [
        "line 2", "line 5", "line 6", "line 6", "line 7", "line 8", "line 9"
    ]  # fmt: skip
    assert found[1] == "line 5: duplicate run_data.run_id 'a' (line 1)"
    assert "run_data.domain: is missing" in found[2] and "run_data.status" in found[3]
    assert "line 8: a record of baselines in a log of training_log" in found
    assert "UTF-8" in found[-1]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "binary"),
        ('{"run_data": {}}\n'.encode("utf-16"), "UTF-16"),
        (b"step,loss\n1,2\n", "is not a log: line 1 is not JSON"),
        (b'"text"\n3\n', "is not a log: line 1 is not a JSON object, but str"),
        (b"\n  \n", "is not a log: line 1 is blank"),
        (b"[" * 100_000 + b"\n", "is not a log: line 1 is not JSON"),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path, content, expected):
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    assert expected in error_of(read_records, path)
    if content:
        assert "is not a log" in error_of(append_records, path, [training("a")])
        assert path.read_bytes() == content


def test_missing_files_directories_and_pipes_are_one_line(tmp_path):
    assert error_of(read_records, tmp_path / "no.jsonl").endswith("no.jsonl: no such file")
    assert "is a directory" in error_of(read_records, tmp_path)
    assert "is a directory" in error_of(append_records, tmp_path, [training("a")])
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in error_of(read_records, tmp_path / "pipe")


# ---- appending ----


def test_appended_records_keep_unknown_fields_and_are_made_json(tmp_path):
    record = training(
        "ü",
        timestamp="2025-10-21T02:00:00.5+02:00",
        end_time="2025-10-21T00:00:00",
        best_val_loss=float("nan"),
        final_metrics={"cycle_loss": float("inf"), "mine": [1.0, float("-inf")]},
        of_mine={"deep": [{"x": 1}]},
    )
    append_records(tmp_path / "deep/er/log.jsonl", [record])
    [found] = read_records(tmp_path / "deep/er/log.jsonl")
    assert found["timestamp"] == "2025-10-21T00:00:00.500000+00:00"
    data = found["run_data"]
    assert data["end_time"] == "2025-10-21T00:00:00+00:00" and data["run_id"] == "ü"
    assert data["of_mine"] == {"deep": [{"x": 1}]}
    assert data["best_val_loss"] is None and data["final_metrics"]["mine"] == [1.0, None]
    assert found["non_finite"] == [
        "run_data.best_val_loss",
        "run_data.final_metrics.cycle_loss",
        "run_data.final_metrics.mine.1",
    ]
    assert record["run_data"]["final_metrics"]["cycle_loss"] == float("inf")  # ours is a copy
    assert validate(tmp_path / "deep/er/log.jsonl") == (1, [])


@pytest.mark.parametrize(
    "bad, expected",
    [
        ([training("b"), training("c", status="done")], "record 2: run_data.status"),
        ([{"run_data": {}}], "record 1: timestamp: is missing"),
        ([training("b", x=object())], "record 1: Object of type object is not JSON"),
        ([training("b", timestamp="soon")], "record 1: timestamp"),
        ([baseline("b")], "is a log of training_log, not of baselines"),
        ([training("b"), baseline("b")], "belong in separate logs"),
    ],
)
def test_all_records_are_appended_or_none(tmp_path, bad, expected):
    path = tmp_path / "log.jsonl"
    append_records(path, [training("a")])
    before = path.read_bytes()
    assert expected in error_of(append_records, path, bad)
    assert path.read_bytes() == before


def test_a_torn_last_line_is_kept_aside_and_reported(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [training("a"), training("b")])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    [_, torn] = read_lines(path)
    assert "cut off by a crash?" in torn.problem
    done = append_records(path, [training("c")])
    assert "was cut off" in done.repaired and str(path) in done.repaired
    assert [r["run_data"]["run_id"] for r in read_records(path)] == ["a", "c"]
    kept = (tmp_path / "log.jsonl.torn").read_bytes()
    assert kept == whole[:-20].splitlines()[1] + b"\n"


def test_a_last_line_that_only_lacks_its_line_feed_stays(tmp_path):
    path = write(tmp_path / "log.jsonl", training("a"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    done = append_records(path, [training("b")])
    assert done.repaired == "added the line feed that the last line lacked"
    assert validate(path) == (2, []) and not (tmp_path / "log.jsonl.torn").exists()


def test_a_log_that_is_nothing_but_a_torn_line_starts_afresh(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"timestamp": "2025')
    assert "was cut off" in append_records(path, [training("a")]).repaired
    assert read_records(path) == [training("a", timestamp="2025-10-21T00:00:00+00:00")]


def test_a_run_is_there_once(tmp_path):
    path = tmp_path / "log.jsonl"
    append_records(path, [training("a", status="running")])
    done = append_records(path, [training("a"), training("b")], skip_existing=True)
    assert done.num_appended == 2
    done = append_records(path, [training("a"), training("c")], skip_existing=True)
    assert done.num_appended == 1
    message = error_of(lambda: append_records(path, [training("b")], refuse_existing=True))
    assert message.endswith("already has run 'b'")
    assert validate(path) == (4, [])


def test_a_disk_that_fills_up_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_records(path, [training("a")])
    before = path.read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_module.os, "fsync", full)
    message = error_of(append_records, path, [training("b")])
    assert "cannot be written (No space left on device)" in message
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/version").is_file(), reason="needs a file no one can write")
def test_a_target_that_is_read_only_is_one_line():
    message = error_of(append_records, "/proc/version", [training("a")])
    assert message.startswith("/proc/version: cannot be written")


def append_many(path: Path, worker: int) -> None:
    for i in range(200):
        data = {"run_id": f"{worker}_{i}", "domain": "planning", "status": "completed"}
        data["x"] = "x" * (37 * i % 5000)
        append_records(path, [{"timestamp": "2025-10-21T00:00:00Z", "run_data": data}])


@pytest.mark.long
def test_eight_processes_lose_and_tear_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=append_many, args=(path, i)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert validate(path) == (1600, [])
    ids = [record["run_data"]["run_id"] for record in read_records(path)]
    for worker in range(8):  # each in its own order
        mine = [name for name in ids if name.startswith(f"{worker}_")]
        assert mine == [f"{worker}_{i}" for i in range(200)]


def test_a_log_that_was_replaced_while_waiting_gets_the_record(tmp_path):
    path = write(tmp_path / "log.jsonl", training("a"))
    script = (
        "import sys, json; from kimi_recursive.records import append_records;"
        "print('ready', flush=True); append_records(sys.argv[1], [json.loads(sys.argv[2])])"
    )
    with log_module._locked(path):
        waiting = subprocess.Popen(
            [sys.executable, "-c", script, str(path), json.dumps(training("b"))],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout.readline() == "ready\n"
        _wait_for_lock(waiting.pid)
        os.replace(write(tmp_path / "new.jsonl", training("c")), path)
    assert waiting.wait(timeout=30) == 0
    assert [r["run_data"]["run_id"] for r in read_records(path)] == ["c", "b"]


def _wait_for_lock(pid: int) -> None:
    """Until the process waits for a lock, as /proc/locks shows it (`->`)."""
    import time

    for _ in range(600):
        waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
        if any(f" {pid} " in line for line in waiting):
            return
        time.sleep(0.05)
    raise AssertionError("it never waited")
