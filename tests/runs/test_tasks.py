"""Tasks of lm-evaluation-harness in the matrix: asked of a model, summed up, compared."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from commands import error_of, write
from html_page import report
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from project import ROOT
from records import make_results, make_tasks, shipped_config, write_json

from kimi_recursive.evaluation import task_names
from kimi_recursive.evaluation import tasks as asking
from kimi_recursive.evaluation.harness import RecursiveLM
from kimi_recursive.evaluation.settings import TaskSettings, TaskSpec
from kimi_recursive.evaluation.task_names import find_tasks
from kimi_recursive.evaluation.tasks import ask, evaluate_tasks
from kimi_recursive.hub.results import read_comparisons
from kimi_recursive.layout import Layout, TaskFiles
from kimi_recursive.matrix.settings import Config
from kimi_recursive.report.answers import summarize
from kimi_recursive.report.problems import find_problems
from kimi_recursive.report.summary import read_matrix
from kimi_recursive.report.tasks import OTHER_MODEL, read_tasks, task_sentence

EXAMPLES = str(ROOT / "examples/lm_eval")
LISTS = """
task: lists
custom_dataset: !function lists.questions
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
    aggregation: !function lists.spread
    higher_is_better: true
"""
QUESTIONS = """
from datasets import Dataset
def questions(**_):
    rows = [{"prompt": f"{n}:", "choices": ["a", "bb"], "answer": n % 2} for n in range(6)]
    return {"test": Dataset.from_list(rows)}
def spread(outcomes):
    return max(outcomes) - min(outcomes)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus, and tasks of a user."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = np.random.default_rng(0)
    words = ["the", "of", "Union", "war", "peace", "year", "treaty", "land", "law", "people"]
    texts = [
        " ".join(f"It {' '.join(draw.choice(words, 6))} {n}." for n in range(3)) for _ in range(4)
    ]
    table = {"document_id": list("abcd"), "text": texts}
    pl.DataFrame(table).write_parquet(folder / "test.parquet")
    write(folder / "mine/lists.yaml", LISTS)
    write(folder / "mine/lists.py", QUESTIONS)
    return folder


def settings(*names: str, **changes) -> TaskSettings:
    return TaskSettings(names, **{"include_path": EXAMPLES, "max_length": 48, **changes})


def test_scores_are_those_of_the_harness_and_each_sample_has_its_outcome(model_dir, folder):
    model = RecursiveLM(path=str(model_dir / "sidecar"), num_steps=1, max_length=48, device="cpu")
    corpus = folder / "test.parquet"
    scores, samples = ask(model, settings("sotu", limit=3), corpus)
    manager = find_tasks(settings("sotu"), corpus)
    found = simple_evaluate(model, tasks=["sotu"], task_manager=manager, limit=3)["results"]
    assert [(s["task"], s["metric"], s["statistic"]) for s in scores] == [
        ("sotu_perplexity", "word_perplexity", "perplexity"),
        ("sotu_perplexity", "byte_perplexity", "perplexity"),
        ("sotu_perplexity", "bits_per_byte", "bits"),
        ("sotu_ending", "acc", "mean"), ("sotu_ending", "acc_norm", "mean"),
        ("sotu_last_word", "exact_match.first_word", "mean"),
    ]  # fmt: skip
    for score in scores:
        metric, _, answers = score["metric"].partition(".")
        theirs = found[score["task"]]
        assert score["value"] == theirs[f"{metric},{answers or 'none'}"]
        mine = samples.filter(task=score["task"], metric=score["metric"])
        assert len(mine) == score["num_samples"] == mine["sample"].n_unique() == 3
        value, stderr = score["statistic"].score(mine["outcome"], mine["weight"])
        assert value == pytest.approx(score["value"]) and stderr == score["stderr"]
        given = theirs[f"{metric}_stderr,{answers or 'none'}"]
        assert given == "N/A" if score["statistic"] != "mean" else given == pytest.approx(stderr)


def test_a_metric_that_is_no_mean_has_a_score_and_no_outcomes(model_dir, folder):
    model = RecursiveLM(path=str(model_dir / "base"), num_steps=0, max_length=48, device="cpu")
    mine = settings("lists", include_path=str(folder / "mine"))
    [acc, spread], samples = ask(model, mine, "")
    assert acc["statistic"] == "mean" and acc["value"] == 0.5 and acc["stderr"] > 0
    assert (spread["metric"], spread["value"], spread["statistic"]) == ("acc_norm", 1.0, None)
    assert spread["stderr"] is None, "the harness has none"
    assert samples["metric"].unique().to_list() == ["acc"] and len(samples) == 6


class Writer(LM):
    """Writes the same behind every prompt."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def generate_until(self, requests, disable_tqdm=False) -> list[str]:
        self.prompts = [request.args[0] for request in requests]
        return [self.text for _ in requests]

    loglikelihood = loglikelihood_rolling = generate_until


def test_the_answer_of_a_held_out_pair_is_the_number_at_its_end(folder, tmp_path):
    corpus = tmp_path / "test.parquet"
    texts = ["Question: 600 + 600?\nAnswer: 2 x 600 is 1,200.\n#### 1,200", "Q #### 7", "plain"]
    table = {"document_id": list("abc"), "text": texts, "num_prompt_characters": [28, 1, None]}
    pl.DataFrame(table).write_parquet(corpus)
    for text, right in (
        (" It is 1200.\n#### 1200", [1.0, 0.0]),
        (" I count 3.\n#### 7", [0.0, 1.0]),
        ("7", [0.0, 0.0]),
    ):
        [score], samples = ask(Writer(text), settings("answer"), corpus)
        assert samples["outcome"].to_list() == right and score["metric"] == "exact_match.number"
    writer = Writer("7")
    ask(writer, settings("answer", num_fewshot=1), corpus)
    example = "Q #### 7\n\nQuestion: 600 + 600?\nAnswer:"
    assert writer.prompts[0] == example and len(writer.prompts) == 2
    for name, path, message in (
        ("answer", folder / "test.parquet", "test.parquet: has no prompts and completions"),
        ("sotu_ending", corpus, "test.parquet: no document has two sentences of 6 to 40 words"),
    ):
        error = error_of(ask, Writer(""), settings(name), path)
        assert message in error


def test_answers_are_kept_and_taken_again_for_the_same_model_alone(
    model_dir, folder, tmp_path, monkeypatch
):
    files, corpus = TaskFiles(tmp_path, "baseline_step_0"), folder / "test.parquet"
    asked = settings("sotu_perplexity", limit=2)

    def evaluate(model: str = "sidecar", step: int = 1, upstream=None, **changes) -> dict:
        spec = TaskSpec("a stage", step, settings(*asked.names, limit=2, **changes), upstream)
        return evaluate_tasks(spec, model_dir / model, corpus, [], files, device="cpu")

    first, table = evaluate(), files.samples.read_bytes()
    assert first == json.loads(files.results.read_text())
    assert first["config"]["chunk_width"] == 8 and first["sidecar_sha256"]
    calls = []
    monkeypatch.setattr(asking, "ask", lambda *a: calls.append(a) or ([], pl.read_parquet(kept)))
    kept = tmp_path / "kept.parquet"
    kept.write_bytes(table)
    files.samples.unlink()
    again = evaluate(upstream={"of": "now"})
    assert not calls and files.samples.read_bytes() == table
    assert again == {**first, "upstream": {"of": "now"}}
    for changes in ({"step": 2}, {"model": "base", "step": 0}, {"num_fewshot": 1}):
        calls.clear()
        found = evaluate(**changes)
        assert len(calls) == 1 and found["scores"] == []
    assert evaluate("base", 0)["sidecar_sha256"] is None


def test_a_name_that_is_not_there_is_one_line_with_the_nearest(folder, monkeypatch):
    """The names of the harness are read, which takes seconds, where those of the folder do not
    do."""
    read = []

    def manager(include_defaults: bool = True, **options) -> TaskManager:
        read.append(include_defaults)
        return TaskManager(include_defaults=False, **options)

    monkeypatch.setattr(task_names, "TaskManager", manager)
    assert "sotu_ending" in find_tasks(settings("sotu", "sotu_ending")).task_index
    assert read == [False]
    error = error_of(find_tasks, settings("sotu", "sotu_endings"))
    expected = "evaluation.tasks.names: unknown task 'sotu_endings'; did you mean 'sotu_ending'?"
    assert error == expected and read == [False, False, True]
    write(folder / "group/g.yaml", "group: mine\ntask: [arc_easy]\n")
    find_tasks(settings("mine", include_path=str(folder / "group")))
    assert read[3:] == [False, True], "a group may name tasks of the harness"


# ---- the summary, from made-up answers -----------------------------------------------------------

CONFIG = shipped_config(phases=["a", "b"], repeat=False)
CONFIG["evaluation"]["tasks"] |= {"names": ["quiz", "page"]}


@pytest.fixture
def made(tmp_path) -> Layout:
    return Layout(make_tasks(make_results(tmp_path / "results", CONFIG), CONFIG))


def read(layout: Layout):
    config = Config.from_mapping(CONFIG)
    return read_tasks(config, layout, read_matrix(config, layout))


def test_summary_csv_has_a_column_for_each_metric_and_step(made):
    summarize(Config.from_mapping(CONFIG), made)
    rows = {row["name"]: row for row in csv.DictReader(made.table.open())}
    plain = shipped_config(phases=["a", "b"], repeat=False)
    summarize(Config.from_mapping(plain), made)
    before = next(csv.reader(made.table.open()))
    more = [key for key in rows["baseline"] if key not in before]
    assert [*before, *more] == list(rows["baseline"]), "the columns of before come first"
    metrics = ("quiz.f1.first", "quiz.acc", "page.word_perplexity")
    steps = [f"{name}{at}" for at in ("", "_step_1", "_step_0") for name in metrics]
    assert sorted(more) == sorted(f"{name}{end}" for name in steps for end in ("", "_stderr"))
    assert rows["baseline"]["quiz.acc"] == "0.375" and rows["after_surgery"]["quiz.acc"] == ""
    mine = rows["finetuned_recursive_b"]
    assert mine["quiz.acc"] == mine["quiz.acc_step_1"] == "0.75" and (
        mine["quiz.acc_step_0"] == "0.375"
    )
    error = float(mine["quiz.acc_stderr"])
    assert error == pytest.approx((0.75 * 0.25 / 39) ** 0.5)
    assert mine["quiz.f1.first_stderr"] == ""


def test_the_loop_is_compared_with_each_reference_in_each_metric(made):
    tasks = read(made)
    acc = [pair for pair in tasks.comparisons if pair.metric == "acc"]
    verdicts = [(pair.arm, pair.reference, pair.verdict) for pair in acc]
    loop = "finetuned_recursive"
    assert verdicts == [
        *((loop, name, "helps") for name in
          ("baseline", "finetuned_single_pass", "finetuned_single_pass_flops")),
        (loop, "its own step 1", "not distinguishable"),
        (f"{loop}_b", "baseline", "helps"), (f"{loop}_b", loop, "not distinguishable"),
        *((f"{loop}_b", name, "helps") for name in (
            "finetuned_single_pass_b", "finetuned_single_pass_flops_b",
            "finetuned_vanilla_b", "finetuned_vanilla_flops_b")),
        (f"{loop}_b", "its own step 1", "not distinguishable"),
        (f"{loop}_b", "its own step 0", "helps"),
    ]  # fmt: skip
    summarize(Config.from_mapping(CONFIG), made)
    compared = read_matrix(Config.from_mapping(CONFIG), made).comparisons
    entries = json.loads(made.verdicts.read_text())
    first = next(entry for entry in entries if entry.get("metric") == "acc")
    mean, low, high = first["change"]
    assert mean == pytest.approx(0.375) and 0 < low < mean < high
    assert first["num_samples"] == 40 and first["unit"] == "metric" and first["task"] == "quiz"
    other = next(entry for entry in entries if entry.get("metric") == "word_perplexity")
    assert other["unit"] == "percent" and other["verdict"] == "not distinguishable"
    none = next(entry for entry in entries if entry.get("metric") == "f1.first")
    assert none["verdict"] is None and "no outcome of its own" in none["problem"]
    assert "task" not in entries[0], "perplexity comes first"
    row = SimpleNamespace(name=loop, stage=loop)
    published = read_comparisons(made.folder, [row], 0)  # what a model card shows
    assert published == [pair for pair in compared if loop in (pair.arm, pair.reference)]
    assert task_sentence(tasks) == (
        "Of 24 comparisons 9 help, 0 hurt, 15 cannot be told from 0. Where nothing differs, about "
        "1.2 would seem to."
    )


def test_summary_and_report_show_the_same_tables(made):
    summarize(Config.from_mapping(CONFIG), made)
    text = made.text.read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "Does recursion help with the tasks?\nOf 24 comparisons 9 help" in text
    page = report(made.folder, CONFIG)
    assert page.all("dt")[-1]["text"] == "Does recursion help with the tasks?"
    assert page.all("dd")[-1]["text"].startswith("Of 24 comparisons 9 help")
    rows = page.rows("Task quiz")
    assert rows[0] == ["baseline", "0", "0.5000", "0.3750 ± 0.0775"]
    assert ["finetuned_recursive", "2", "0.5000", "0.7500 ± 0.0693"] in rows
    compared = page.rows("Task quiz, acc: the loop against its references")
    assert compared[0][:4] == ["finetuned_recursive", "baseline", "0", "+0.3750"]
    assert compared[0][-1].endswith("helps")
    assert "Higher is better. At inner step 2. Paired bootstrap over 40 samples" in page.text
    assert "Paired bootstrap over 40 samples" in text and "0.7500 ± 0.0693" in text
    assert "Tasks" in [e["text"].strip() for e in page.all("h2")]
    assert "f1.first: a sample has no outcome of its own" in page.text


def test_answers_that_are_missing_damaged_or_of_another_model_are_said(made):
    loop = "finetuned_recursive"
    made.tasks(loop, 1).results.unlink()
    log = made.log("evaluate_tasks", f"{loop}_step_1")
    write(log, "error: Duplicate task 'a'\n")
    made.tasks("finetuned_single_pass", 1).results.write_text("{")
    made.tasks("finetuned_single_pass_flops", 1).results.unlink()
    for files, changes in ((made.tasks(loop, 2), {"sidecar_sha256": "x"}),
                           (made.tasks(f"{loop}_b", 2), {"tasks": {"limit": 7}})):  # fmt: skip
        write_json(files.results, json.loads(files.results.read_text()) | changes)
    found = {name: (status, detail) for name, status, detail in read(made).problems}
    at = "{}, tasks at inner step {}".format
    assert found[at(loop, 1)] == ("failed", "Duplicate task 'a'")
    status, detail = found[at("finetuned_single_pass", 1)]
    assert status == "failed" and "is not valid JSON" in detail
    assert found[at("finetuned_single_pass_flops", 1)] == ("missing", "")
    assert found[at(loop, 2)] == ("missing", OTHER_MODEL)
    status, detail = found[at(f"{loop}_b", 2)]
    assert status == "missing" and "a different evaluation.tasks.names" in detail
    assert len(found) == 5
    summarize(Config.from_mapping(CONFIG), made)
    assert OTHER_MODEL in made.text.read_text()
    config = Config.from_mapping(CONFIG)
    shown = find_problems(config, made, read_matrix(config, made), read(made), [], {})
    assert {problem.name: (problem.status, problem.detail) for problem in shown} == found
    assert [log.path for problem in shown for log in problem.logs] == [log]


@pytest.mark.parametrize(("change", "problem"), [
    ({"higher_is_better": None}, "the task does not say whether higher is better"),
    ({"num_samples": 19}, "19 samples are too few for a verdict, 20 is the least."),
])  # fmt: skip
def test_what_cannot_be_judged_has_no_verdict_and_says_why(made, change, problem):
    for path in (made.folder / "eval/tasks").glob("*.json"):
        found = json.loads(path.read_text())
        [acc] = [score for score in found["scores"] if score["metric"] == "acc"]
        acc |= change
        write_json(path, found)
    pairs = [pair for pair in read(made).comparisons if pair.metric == "acc"]
    assert len(pairs) == 12 and all(pair.problem.startswith(problem) for pair in pairs)
    assert not any(pair.verdict for pair in pairs)
    others = [pair for pair in read(made).comparisons if pair.metric == "word_perplexity"]
    assert all(pair.verdict for pair in others)


def test_damaged_samples_leave_the_other_comparisons(made):
    made.tasks("baseline", 0).samples.write_bytes(b"PAR1")
    pairs = [pair for pair in read(made).comparisons if pair.metric == "acc"]
    assert {pair.reference for pair in pairs if pair.problem} == {"baseline"}
    assert sum(pair.difference is not None for pair in pairs) == 10
    summarize(Config.from_mapping(CONFIG), made)
    text = "".join(made.text.read_text().split())
    assert "baseline_step_0_samples.parquet:truncatedornotaparquetfile" in text
