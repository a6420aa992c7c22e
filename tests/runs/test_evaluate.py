"""Evaluation and the zero-init gate: numbers by hand, and every check seen to fail."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from models import SMALL, make_base, make_wrapper, perturb, random_ids
from transformers import PreTrainedTokenizerFast

from kimi_recursive import ChunkRefineWrapper, RecursiveConfig, data
from kimi_recursive.data.tokens import TokenSplit, load_tokens
from kimi_recursive.data.windows import document_windows
from kimi_recursive.evaluation.samples import generate_samples
from kimi_recursive.evaluation.scores import (
    Scored,
    document_scores,
    evaluate_model,
    halting_scores,
    score_windows,
)
from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.evaluation.stage import evaluate_stage
from kimi_recursive.evaluation.zero_init import (
    compare_zero_init,
    prove_zero_init,
    require_zero_init,
)
from kimi_recursive.layout import SIDECAR_NAME, Layout
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.sidecar import save_sidecar
from kimi_recursive.training.surgery import insert_cells

SETTINGS = EvaluationSettings(
    context_length=16, batch_size=4, max_windows_per_document=2, prompts=[], max_new_tokens=6
)


def make_split(lengths=(40, 16, 21, 2, 1)) -> TokenSplit:
    tokens = random_ids(1, sum(lengths)).numpy()[0].astype(np.int32)
    ids = [f"doc{i}" for i in range(len(lengths))]
    return TokenSplit(ids, tokens, np.cumsum([0, *lengths]))


@torch.no_grad()
def test_scores_equal_a_plain_forward_of_the_refined_model_window_by_window(base):
    wrapper, split = perturb(make_wrapper(base)), make_split()
    windows = document_windows(split, 16, 2)
    documents = document_scores(score_windows(wrapper, windows, 4), split)
    assert documents["document_id"].unique(maintain_order=True).to_list() == [
        f"doc{i}" for i in range(4)
    ]
    for step in (0, 1, 3):
        rows = documents.filter(pl.col("step") == step)
        assert rows["num_tokens"].to_list() == [32, 15, 20, 1]
        for number, row in enumerate(rows.iter_rows(named=True)):
            loss, correct = 0.0, 0
            for w in [w for w in windows if w.document == number]:
                logits = wrapper(torch.from_numpy(w.inputs)[None], num_steps=step).logits[0]
                gold = torch.from_numpy(w.targets)
                loss += float(F.cross_entropy(logits, gold, reduction="sum"))
                correct += int((logits.argmax(-1) == gold).sum())
            assert row["loss_sum"] == pytest.approx(loss, rel=1e-4)
            assert row["num_correct"] == correct


@torch.no_grad()
def test_batch_size_changes_the_score_by_rounding_only():
    wrapper, split = perturb(make_wrapper(make_base("kimi"))), make_split()
    windows = document_windows(split, 16, 2)
    one, many = (document_scores(score_windows(wrapper, windows, n), split) for n in (1, 8))
    np.testing.assert_allclose(one["loss_sum"], many["loss_sum"], rtol=1e-5)
    assert one.drop("loss_sum").equals(many.drop("loss_sum"))


def test_summary_numbers_by_hand():
    split = make_split()
    wrapper = perturb(make_wrapper(make_base("llama")))
    results, documents = evaluate_model(wrapper, None, split, SETTINGS)
    last = documents.filter(pl.col("step") == 3)
    loss = last["loss_sum"].sum() / last["num_tokens"].sum()
    assert results["perplexity"]["loss"] == pytest.approx(loss)
    assert results["perplexity"]["perplexity"] == pytest.approx(np.exp(loss))
    accuracy = last["num_correct"].sum() / 68
    assert results["perplexity"]["token_accuracy"] == pytest.approx(accuracy)
    assert (results["perplexity"]["num_tokens"], results["perplexity"]["num_documents"]) == (68, 4)
    assert [row["step"] for row in results["perplexity"]["by_step"]] == [0, 1, 2, 3]
    assert results["inner_steps"] == 3 and 1 <= results["halting"]["mean_inner_steps"] <= 3
    assert results["num_rounds_by_step"] == [0, 0, 0], "no prompts"
    counts = results["halting"]["num_chunks_by_step"]
    assert np.average([1, 2, 3], weights=counts) == results["halting"]["mean_inner_steps"]
    assert results["throughput"]["evaluated_tokens_per_second"] > 0
    json.dumps(results, allow_nan=False)


def test_halting_stops_at_the_first_step_above_the_threshold():
    chunks = [[0.1, 0.8, 0.1], [0.9, 0.1, 0.1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.9]]
    rows = [
        {"document": d, "start": 0, "chunk": 0, "step": t, "p_commit": p,
         "num_running": None, "num_tokens": 10, "loss_sum": 10.0 * t + d}
        for d, commits in enumerate(chunks)
        for t, p in enumerate([None, *commits])
    ]  # fmt: skip
    found = halting_scores(pl.DataFrame(rows), 0.7)
    assert found["mean_inner_steps"] == (2 + 1 + 3 + 3) / 4
    assert found["num_chunks_by_step"] == [1, 1, 2]
    assert found["perplexity"] == pytest.approx(np.exp((20 + 11 + 32 + 33) / 40))
    assert halting_scores(pl.DataFrame(rows).filter(pl.col("step") == 0), 0.7) is None


def test_prompts_need_a_tokenizer_and_documents_need_two_tokens():
    wrapper = make_wrapper(make_base("llama"))
    with pytest.raises(ValueError, match="need a tokenizer"):
        evaluate_model(wrapper, None, make_split(), replace(SETTINGS, prompts=["x"]))
    with pytest.raises(ValueError, match="no document of at least two tokens"):
        evaluate_model(wrapper, None, make_split((1, 1)), SETTINGS)


# ---- the stages and the gate --------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A base with its tokenizer, tokens, surgery, and both evaluations."""
    root = tmp_path_factory.mktemp("stages")
    words = [f"w{i}" for i in range(60)]
    (root / "docs").mkdir()
    for i in range(9):
        text = " ".join(words[(i * 7 + n * n) % 60] for n in range(30 + i))
        (root / f"docs/{i}.txt").write_text(text)
    corpus = {"source": str(root / "docs"), "validation": 0.2, "test": 0.34, "seed": 0}
    data.prepare_corpus(corpus, root / "corpus")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(words), bos_token="<bos>", eos_token="<eos>"
    )
    make_base("kimi").save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    data.tokenize_corpus(root / "corpus", root / "base", root / "tokens")
    insert_cells(root / "base", SMALL, 0, root / "surgery")
    evaluate(root, "baseline", root / "base", chunk_width=8)
    evaluate(root, "after_surgery", root / "surgery")
    return root


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def evaluate(
    root: Path, stage: str, model: Path, name: str | None = None, settings=None, **overrides
) -> dict:
    changed = {"prompts": ["w1 w2", "w5"], **(settings or {})}
    spec = EvaluationSpec(stage, replace(SETTINGS, **changed))
    files = Layout(root).evaluation(name or stage)
    return evaluate_stage(spec, model, root / "tokens", files, overrides=overrides)


def proof(root: Path, model: Path | None = None, settings=None) -> dict:
    changed = {"prompts": ["w1 w2", "w5"], **(settings or {})}
    result = prove_zero_init(
        root / "base",
        model or root / "surgery",
        root / "tokens",
        replace(SETTINGS, **changed),
        {},
        root / "zero_init.json",
    )
    assert result == json.loads((root / "zero_init.json").read_text())
    return result


def scored(root: Path, stage: str) -> Scored:
    files = Layout(root).evaluation(stage)
    return json.loads(files.results.read_text()), pl.read_parquet(files.documents)


def failed(result: dict) -> set[str]:
    return {c["name"] for c in result["checks"] if not c["passed"]}


def test_results_hold_what_the_seed_reads(stages):
    results = json.loads((stages / "eval/after_surgery_results.json").read_text())
    assert {"perplexity", "token_accuracy"} <= set(results["perplexity"])
    assert results["config"]["recursive_enabled"] and results["config"]["chunk_width"] == 8
    assert results["versions"]["torch"] == torch.__version__
    assert results["stage"] == "after_surgery" and results["num_parameters"]["sidecar"] > 0
    assert [s["prompt"] for s in results["generations"]] == ["w1 w2", "w5"]
    assert all(len(s["token_ids"]) <= 6 for s in results["generations"])
    rounds = results["num_rounds_by_step"]
    assert rounds[:-1] == [0, 0] and rounds[-1] >= 2 and results["mean_inner_steps"] == 3
    baseline = json.loads((stages / "eval/baseline_results.json").read_text())
    assert baseline["inner_steps"] == 0 and not baseline["config"]["recursive_enabled"]
    assert len(baseline["perplexity"]["by_step"]) == 1
    assert baseline["num_rounds_by_step"] == [] and baseline["halting"] is None


def test_a_fresh_surgery_passes(stages):
    result = proof(stages)
    assert result["passed"] and failed(result) == set()
    assert result["max_logit_difference"] == 0 and result["generations_identical"]
    noise = [c for c in result["checks"] if c["name"].startswith("logit_change_with_noise_on_")]
    assert len(noise) == 5 and all(c["value"] > 0 for c in noise)
    require_zero_init(stages / "zero_init.json")


def test_cells_that_are_not_zero_fail_and_the_error_says_which_check_by_how_much(stages, tmp_path):
    model, _, _ = load_model_with_config(stages / "surgery")
    with torch.no_grad():
        model.refine_cells[2].out.weight[0, 0] = 5.0
    save_sidecar(model, tmp_path / "bad", stages / "base")
    result = proof(stages, tmp_path / "bad")
    assert not result["passed"] and result["max_logit_difference"] > 0
    assert {"document_loss_difference", "logit_difference_between_steps"} <= failed(result)
    with pytest.raises(ValueError) as error:
        require_zero_init(stages / "zero_init.json")
    value = f"{result['max_logit_difference']:.6g}"
    assert f"logit_difference_between_steps is {value}, must be <= 0" in str(error.value)
    assert "training does not start" in str(error.value) and "\n" not in str(error.value)


def test_a_loop_that_is_not_in_the_path_fails(stages, monkeypatch):
    """The trap of the original: parity holds because nothing is refined."""
    inert = ChunkRefineWrapper.refine

    def passed_through(self, chunk, input_ids=None):
        after = inert(self, chunk, input_ids)
        after.h_top, after.logits = chunk.h_top, chunk.logits
        return after

    monkeypatch.setattr(ChunkRefineWrapper, "refine", passed_through)
    result = proof(stages)
    assert failed(result) == {
        "logit_change_with_noise_on_latent",
        *(f"logit_change_with_noise_on_refine_cells.{i}" for i in range(4)),
    }


@pytest.mark.parametrize("name", ["perplexity", "token_accuracy"])
def test_a_drift_of_the_scores_fails(stages, name):
    wrapper, tokenizer, _ = load_model_with_config(stages / "surgery")
    split = load_tokens(stages / "tokens", "test")
    before, (results, documents) = scored(stages, "baseline"), scored(stages, "after_surgery")

    def broken(changed: dict) -> set[str]:
        after = (changed, documents)
        return failed(compare_zero_init(before, after, wrapper, tokenizer, split, SETTINGS))

    assert broken(results) == set()
    changed = copy.deepcopy(results)
    changed["perplexity"][name] += 0.5
    assert broken(changed) == {f"{name}_difference_percent"}
    changed["generations"][1]["token_ids"][0] += 1
    changed["perplexity"][name] = results["perplexity"][name]
    assert broken(changed) == {"generations_differing"}


def test_a_chunked_path_that_differs_from_the_base_fails(stages, monkeypatch):
    encode = ChunkRefineWrapper.start_chunk

    def off_by_a_token(self, input_ids, prefix, mask=None):
        return encode(self, input_ids, self.new_cache(), mask)  # the prefix is forgotten

    monkeypatch.setattr(ChunkRefineWrapper, "start_chunk", off_by_a_token)
    assert "logit_difference_to_base_forward" in failed(proof(stages))


def test_a_bf16_base_passes_and_its_broken_cells_fail(stages, tmp_path):
    """Decoding by token and by chunk round apart; the gate must not take that for a fault."""
    (tmp_path / "tokens").symlink_to(stages / "tokens")
    base, tokenizer, _ = load_model_with_config(stages / "base")
    base.base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    insert_cells(tmp_path / "base", SMALL, 0, tmp_path / "surgery")
    more = {"prompts": [f"w{i} w{i + 7}" for i in range(4)], "max_new_tokens": 12}
    before = evaluate(tmp_path, "baseline", tmp_path / "base", settings=more, chunk_width=8)
    after = evaluate(tmp_path, "after_surgery", tmp_path / "surgery", settings=more)
    assert before["generations"] != after["generations"], "some do round apart"
    result = proof(tmp_path, settings=more)
    assert failed(result) == set() and result["max_logit_difference"] == 0
    model, _, _ = load_model_with_config(tmp_path / "surgery")
    with torch.no_grad():
        model.refine_cells[2].out.weight[0, 0] = 5.0
    save_sidecar(model, tmp_path / "bad", tmp_path / "base")
    broken = proof(tmp_path, tmp_path / "bad", more)
    assert {"document_loss_difference", "generations_differing"} <= failed(broken)


def test_a_repetition_penalty_in_the_generation_config_does_not_make_another_baseline(
    stages, tmp_path
):
    shutil.copytree(stages / "base", tmp_path / "base")
    path = tmp_path / "base/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 5.0}))
    plain, tokenizer, _ = load_model_with_config(stages / "base")
    penalised, _, _ = load_model_with_config(tmp_path / "base")
    prompts = [f"w{i} w{i} w{2 * i}" for i in range(1, 5)]
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    by_default = [m.base.generate(ids, max_new_tokens=24).tolist() for m in (plain, penalised)]
    assert by_default[0] != by_default[1], "the penalty would show"
    samples = [generate_samples(m, tokenizer, prompts, 24)[0] for m in (plain, penalised)]
    assert samples[0] == samples[1]


def test_a_context_beyond_the_positions_of_the_base_is_refused():
    wrapper = make_wrapper(make_base("gpt2"))
    with pytest.raises(ValueError, match="500 tokens are more than the base's 128 positions"):
        evaluate_model(wrapper, None, make_split(), replace(SETTINGS, context_length=500))


def test_insert_cells_refuses_layers_that_the_base_does_not_have(stages, tmp_path):
    with pytest.raises(ValueError, match=r"\[9\] out of range; the base has 4 layers"):
        insert_cells(stages / "base", {**SMALL, "layers_to_refine": [9]}, 0, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_generation_thresholds_may_be_changed_at_evaluation(stages):
    results = evaluate(stages, "after_surgery", stages / "surgery", "low", commit_threshold=0.3)
    assert results["config"]["commit_threshold"] == 0.3
    saved = RecursiveConfig.from_file(stages / "surgery/recursive_config.json")
    assert saved.commit_threshold == 0.7 and (stages / "surgery" / SIDECAR_NAME).is_file()
