"""Pairs: what is scored is what would be generated, and what the positive control makes of it."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from models import make_base, make_wrapper, perturb, random_ids
from project import ROOT

from kimi_recursive import RecursiveConfig
from kimi_recursive.data.tokens import TokenSplit
from kimi_recursive.data.windows import document_windows
from kimi_recursive.evaluation.bootstrap import wilson_interval
from kimi_recursive.evaluation.samples import chain_of_thought_answers
from kimi_recursive.evaluation.scores import (
    document_scores,
    exact_match_by_group,
    score_windows,
)
from kimi_recursive.layout import Layout
from kimi_recursive.matrix.runs import evaluations
from kimi_recursive.matrix.settings import Config, read_config
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.report.composition import compare_composition, composition_lines
from kimi_recursive.report.figures import plot_composition
from kimi_recursive.training.batches import token_digests


def pairs(prompts: torch.Tensor, completions: torch.Tensor, groups: list[str]) -> TokenSplit:
    rows = torch.cat([prompts, completions], dim=1).to(torch.int32).numpy()
    count, length = rows.shape
    return TokenSplit(
        [f"p{i}" for i in range(count)],
        rows.flatten(),
        np.arange(count + 1, dtype=np.int64) * length,
        np.full(count, prompts.shape[1], dtype=np.int64),
        groups,
    )


@pytest.mark.parametrize("options", [{}, {"use_token_feedback": True}, {"halting": "expected"}])
def test_a_completion_is_exact_where_greedy_generation_gives_it(options):
    wrapper = perturb(make_wrapper(make_base("kimi"), max_inner_steps=2, **options))
    prompts = random_ids(4, 5)
    generated = wrapper.generate_chunks(prompts, max_new_tokens=11, eos_token_id=[])
    answers = generated[:, 5:].clone()
    assert answers.shape[1] == 11 > wrapper.config.chunk_width, "over the border of a chunk"
    answers[3, 9] = (answers[3, 9] + 1) % 97
    split = pairs(prompts, answers, ["a", "a", "b", "b"])
    windows = document_windows(split, 32, None)
    documents = document_scores(score_windows(wrapper, windows, 3), split)
    rows = {(r["group"], r["step"]): r for r in exact_match_by_group(documents, split)}
    assert rows["a", 2]["exact_match"] == 1.0 and rows["b", 2]["exact_match"] == 0.5
    assert rows["a", 2]["num_pairs"] == 2
    low, high = rows["b", 2]["exact_match_interval"]
    assert 0 < low < 0.5 < high < 1
    shallow = wrapper.generate_chunks(prompts, max_new_tokens=11, eos_token_id=[], num_steps=1)
    same = (shallow[:, 5:] == answers).all(1)
    assert rows["a", 1]["exact_match"] == same[:2].float().mean()
    assert documents["num_tokens"].to_list() == [11] * 12
    assert ("mean_inner_steps" in rows["a", 1]) == ("halting" in options)
    if "halting" in options:
        taken = [rows["a", step]["mean_inner_steps"] for step in (0, 1, 2)]
        assert taken[:2] == [0, 1] and 1 < taken[2] < 2, "at most so many"


def test_plain_text_among_pairs_is_scored_and_is_no_pair():
    wrapper = perturb(make_wrapper(make_base("kimi"), max_inner_steps=1))
    split = pairs(random_ids(3, 5), random_ids(3, 4), ["a", None, None])
    split.num_prompt[2] = 1
    documents = document_scores(score_windows(wrapper, document_windows(split, 32, None), 3), split)
    assert documents.filter(pl.col("step") == 0)["num_tokens"].to_list() == [4, 4, 8]
    found = {
        (r["group"], r["step"]): r["num_pairs"] for r in exact_match_by_group(documents, split)
    }
    assert found == {("a", 0): 1, ("a", 1): 1, (None, 0): 1, (None, 1): 1}


def test_a_base_may_write_before_it_answers():
    base = make_base("kimi")
    wrapper = ChunkRefineWrapper(base, RecursiveConfig())
    prompts = random_ids(3, 5)
    written = base.generate(prompts, max_new_tokens=4, do_sample=False, eos_token_id=None)[:, 5:]
    answers = torch.stack([written[0, 2:3], written[1, 0:1], (written[2, :1] + 1) % 97])
    late = next((i for i, token in enumerate(written[0]) if token == answers[0, 0]), None)
    split = pairs(prompts, answers, ["g"] * 3)
    found = chain_of_thought_answers(wrapper, document_windows(split, 8, None), 2, 3)
    places = dict(found.iter_rows())
    assert places[0] == late and places[1] == 0
    assert places[2] is None or written[2, places[2]] == answers[2, 0]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_interval(successes, trials, low, high):
    """Values of statsmodels' proportion_confint(method="wilson")."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.fixture
def control(tmp_path):
    """The config of a control, and the scores of its arms: the loop is right where it may be."""
    defaults, own = ROOT / "config/config.yaml", tmp_path / "control.yaml"
    own.write_text((ROOT / "config/composition.yaml").read_text())
    settings = read_config([defaults, own]) | {"results_dir": str(tmp_path / "results")}
    config = Config.from_mapping(settings | {"composition": None, "seeds": [0, 1]})
    for run in evaluations(config):
        steps = [0] if run.seed is None else [0, 1, 2, 3] if "recursive" in run.stage else [0, 1]
        rows = [
            {
                "document_id": f"{who}{hops}{i}",
                "step": step,
                "num_tokens": 1,
                "loss_sum": 1.0,
                "num_correct": int(step == hops - 1 and (step == 0 or "recursive" in run.stage)),
                "group": f"{who}, {hops} hop{'s' * (hops > 1)}",
                **({"answer_offset": hops - 1 if i else None} if run.seed is None else {}),
            }
            for who in ("seen", "unseen")
            for hops in (1, 2, 3, 4)
            for i in range(20)
            for step in steps
        ]
        path = config.layout.evaluation(run.name).documents
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows).write_parquet(path)
    return config


def test_the_control_says_yes_where_only_the_loop_answers(control, tmp_path):
    names = ("composition.csv", "composition.json", "composition.png")
    table, answer, figure = (tmp_path / name for name in names)
    compare_composition(control, table, answer)
    plot_composition(table, figure)
    rows = pl.read_csv(table)
    assert rows.columns == [
        "arm", "seed", "entities", "hops", "step", "num_problems", "accuracy",
    ]  # fmt: skip
    loop = rows.filter((pl.col("arm") == "recursive") & (pl.col("entities") == "unseen"))
    right = loop.filter(pl.col("step") == pl.col("hops") - 1)["accuracy"]
    assert right.to_list() == [1.0] * 8 and loop["num_problems"].unique().to_list() == [20]
    steps = rows.filter((pl.col("arm") == "base, chain of thought") & (pl.col("hops") == 2))
    assert steps["accuracy"].to_list() == [0.95, 0.95]
    found = json.loads(answer.read_text())
    verdicts = {c["reference"]: c["verdict"] for c in found["comparisons"]}
    assert verdicts == {
        "base": "helps", "single_pass": "helps", "single_pass_flops": "helps",
        "base, chain of thought": "not distinguishable",
    }  # fmt: skip
    assert [b["accuracy"] for b in found["beyond"]] == [1.0, 1.0]
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_no_interval_of_shares_leaves_their_bounds(control, tmp_path):
    """Two seeds that differ by a tenth, of which Student's t makes an interval of +-0.6."""
    path = Layout(tmp_path / "results").evaluation("finetuned_recursive_s1").documents
    tenth = pl.col("document_id").str.ends_with("0")
    wrong = pl.when(tenth).then(0).otherwise(pl.col("num_correct")).alias("num_correct")
    pl.read_parquet(path).with_columns(wrong).write_parquet(path)
    answer = tmp_path / "composition.json"
    compare_composition(control, tmp_path / "composition.csv", answer)
    mean, low, high = json.loads(answer.read_text())["comparisons"][1]["difference"]
    assert mean == pytest.approx(0.95) and low < 0.8 and high == 1.0


def test_the_summary_says_no_where_a_control_answers_too(control, tmp_path):
    layout = Layout(tmp_path / "results")
    for name in ("finetuned_single_pass", "finetuned_single_pass_s1"):
        path = layout.evaluation(name).documents
        pl.read_parquet(path).with_columns(num_correct=1).write_parquet(path)
    assert composition_lines(layout) == ["(the positive control has not run)"]
    compare_composition(control, layout.composition_table, layout.composition_answer)
    text = "\n".join(composition_lines(layout))
    assert "No: the loop answers 100.0 %" in text and "control 100.0 %" in text


def test_the_config_of_the_control_is_one_a_user_could_write():
    text = (ROOT / "config/composition.yaml").read_text()
    assert set(yaml.safe_load(text)) <= set(read_config([ROOT / "config/config.yaml"]))


def test_the_fingerprint_of_a_base_names_what_the_base_reads(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.parquet").write_text(split)
    assert token_digests(tmp_path).keys() == {"train", "validation"}
    (tmp_path / "pretrain.parquet").write_text("facts")
    before = token_digests(tmp_path)
    (tmp_path / "pretrain.parquet").write_text("other facts")
    changed = {k for k, v in token_digests(tmp_path).items() if v != before[k]}
    assert changed == {"pretrain"}
