"""The wrapped model under lm-evaluation-harness: the base is `hf`, a step is that of evaluate."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from commands import call, error_of
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import adapted, make_base, make_wrapper, perturb
from project import ROOT

from kimi_recursive.data.windows import Window
from kimi_recursive.evaluation.harness import RecursiveLM
from kimi_recursive.evaluation.scores import score_windows
from kimi_recursive.model.loading import load_model_with_config, load_tokenizer
from kimi_recursive.model.sidecar import save_sidecar

TASKS = ROOT / "examples/lm_eval"
CONTEXT = 48
TEXT = "The Union was never stronger than it is. " * 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Four documents of sentences, where `held_out.py` finds them."""
    path = tmp_path_factory.mktemp("corpus") / "test.parquet"
    words = ["the", "of", "Union", "war", "peace", "year", "treaty", "land", "law", "people"]
    draw = np.random.default_rng(0)
    texts = [
        " ".join(f"It {' '.join(draw.choice(words, 6))} {n}." for n in range(3)) for _ in range(4)
    ]
    pl.DataFrame({"document_id": list("abcd"), "text": texts}).write_parquet(path)
    return path


@pytest.fixture(scope="module")
def tasks(corpus) -> TaskManager:
    metadata = {"corpus": str(corpus), "num_characters": 100}
    return TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)


@pytest.fixture(scope="module")
def sidecar(model_dir, tmp_path_factory):
    """Of a kind: perturbed cells and token feedback, with a tokenizer at the base."""
    root = tmp_path_factory.mktemp("models")

    def made(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            base = with_tokenizer(make_base(kind), folder, model_dir)
            wrapper = perturb(make_wrapper(base, use_token_feedback=True))
            save_sidecar(wrapper, folder, folder / "base")
        return folder

    return made


def with_tokenizer(base, folder: Path, model_dir: Path):
    """Saves them as `folder`/base."""
    base.resize_token_embeddings(300)
    base.save_pretrained(folder / "base")
    load_tokenizer(model_dir / "tokenizer").save_pretrained(folder / "base")
    return base


def model(folder: Path, num_steps: int | None = None, **options) -> RecursiveLM:
    options = {"device": "cpu", "max_length": CONTEXT, **options}
    return RecursiveLM(path=str(folder), num_steps=num_steps, **options)


def scored(lm: HFLM, tasks: TaskManager) -> tuple[dict, dict]:
    """Every metric, and every answer of the model (log-probabilities, texts), by task."""
    found = evaluate(lm, tasks.load(["sotu"]), bootstrap_iters=0)
    answers = {task: [row["resps"] for row in rows] for task, rows in found["samples"].items()}
    return found["results"], answers


def requests(*arguments: tuple) -> list[Instance]:
    return [Instance("loglikelihood", {}, a, i) for i, a in enumerate(arguments)]


BOS_OPTIONS = {"add_bos_token": True, "prefix_token_id": 5}


@pytest.mark.parametrize("kind, given", [("kimi", {}), ("gpt2", {}), ("llama", BOS_OPTIONS)])
def test_step_0_is_the_hf_model_number_for_number(sidecar, tasks, kind, given):
    options = {"device": "cpu", "max_length": CONTEXT, "batch_size": 4, **given}
    theirs = scored(HFLM(pretrained=str(sidecar(kind) / "base"), **options), tasks)
    ours = scored(model(sidecar(kind), 0, **options), tasks)
    assert ours == theirs
    results, answers = ours
    counts = {"sotu_perplexity": 4, "sotu_ending": 8, "sotu_last_word": 8}
    assert {task: len(rows) for task, rows in answers.items()} == counts
    assert results["sotu_perplexity"]["byte_perplexity,none"] > 1
    refined = scored(model(sidecar(kind), **options), tasks)[1]
    assert all(refined[task] != answers[task] for task in counts)


@pytest.mark.parametrize("kind", ["kimi", "llama"])
def test_log_likelihoods_at_a_step_are_those_of_evaluate(sidecar, kind):
    """On two windows: the harness starts the second where evaluate does when it is full."""
    wrapper, tokenizer, _ = load_model_with_config(sidecar(kind))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    context = len(ids) // 2
    text = tokenizer.decode(ids[: 2 * context])
    tokens = np.array([tokenizer.bos_token_id, *ids[: 2 * context]])
    windows = [
        Window(0, s, tokens[s : s + context], tokens[s + 1 : s + 1 + context]) for s in (0, context)
    ]
    table = score_windows(wrapper, windows, batch_size=2, num_steps=4)
    expected = dict(table.group_by("step").agg(pl.col("loss_sum").sum()).iter_rows())
    options = {"max_length": context, "add_bos_token": False, "batch_size": 2}
    for num_steps in (0, 1, 4):
        lm = model(sidecar(kind), num_steps, **options)
        assert lm.tok_encode(text) == ids[: 2 * context] and context % 8
        [found] = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
        assert found == pytest.approx(-expected[num_steps], rel=1e-5)
    assert len({round(loss, 2) for loss in expected.values()}) == 5, "steps that differ"


def test_a_choice_is_scored_by_the_wrappers_forward_pass(sidecar):
    wrapper, tokenizer, _ = load_model_with_config(sidecar("kimi"))
    prompt, ending = "The Union was never", " stronger"
    context, answer = (tokenizer.encode(s, add_special_tokens=False) for s in (prompt, ending))
    for num_steps in (1, None):
        lm = model(sidecar("kimi"), num_steps, add_bos_token=False)
        [(found, greedy)] = lm.loglikelihood(requests((prompt, ending)), disable_tqdm=True)
        ids = torch.tensor([context + answer])
        with torch.no_grad():
            logits = wrapper(ids[:, :-1], num_steps=num_steps).logits[0, -len(answer) :]
        expected = logits.log_softmax(-1)[range(len(answer)), answer].sum()
        assert found == pytest.approx(float(expected), rel=1e-6) and not greedy


@pytest.mark.parametrize("kind", ["kimi", "gpt2"])
def test_padding_batches_and_order_change_no_answer(sidecar, kind):
    """Requests of different lengths share a batch, padded on the right for scores and on the left
    for generation; some prompts are longer than the context."""
    asked = [(TEXT[:n], TEXT[n : n + 9]) for n in (3, 30, 11, 90, 140)]
    until = {"until": ["e "], "max_gen_toks": 10}
    found = []
    for batch_size, order in ((1, 1), (5, -1)):
        lm = model(sidecar(kind), batch_size=batch_size)
        pairs = lm.loglikelihood(requests(*asked[::order]), disable_tqdm=True)[::order]
        prompts = requests(*((prompt, until) for prompt, _ in asked[::order]))
        found.append((pairs, lm.generate_until(prompts, disable_tqdm=True)[::order]))
    (alone, texts), (together, same_texts) = found
    assert [v for v, _ in alone] == pytest.approx([v for v, _ in together], rel=1e-5)
    assert texts == same_texts and len(set(texts)) == 5


def test_generation_is_generate_chunks_up_to_the_first_stop(sidecar):
    """One of the two rows of a batch ends early, by the end-of-text token."""
    wrapper, tokenizer, _ = load_model_with_config(sidecar("llama"))
    prompts, found = ["treaty", "It is the war of"], set()
    for commit, num_steps in (("verified", 1), ("verified", 3), ("learned", None)):
        lm = model(sidecar("llama"), num_steps, commit=commit, batch_size=2)
        options = {"max_new_tokens": 24, "commit": commit, "num_steps": num_steps}
        whole = []
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt)])
            new = wrapper.generate_chunks(ids, **options)[0, ids.shape[1] :]
            whole.append(tokenizer.decode(new, skip_special_tokens=True))
        assert len(whole[0]) > 20 and len(whole[1]) < 10
        stop = whole[0][6:8]
        for until, expected in (([], whole), ([stop], [text.split(stop)[0] for text in whole])):
            kwargs = {"until": until, "max_gen_toks": 24, "temperature": 0.0}
            asked = requests(*((prompt, kwargs) for prompt in prompts))
            assert lm.generate_until(asked, disable_tqdm=True) == expected
        found.add(tuple(whole))
    assert len(found) == 3


def test_a_base_that_is_spread_over_devices_scores_the_same(sidecar, capsys):
    asked = requests(("The Union was", " never stronger"))
    whole = model(sidecar("gpt2")).loglikelihood(asked, disable_tqdm=True)
    spread = model(sidecar("gpt2"), device_map={"transformer": "cpu", "lm_head": "cpu"})
    assert "device_map: modules on each device: cpu" in capsys.readouterr().err
    assert spread.loglikelihood(asked, disable_tqdm=True) == whole


def test_sampling_is_that_of_the_refined_model(sidecar):
    wrapper, tokenizer, _ = load_model_with_config(sidecar("llama"))
    ids = torch.tensor([tokenizer.encode("The Union")])
    sampling = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 4}
    new = wrapper.generate_chunks(ids, max_new_tokens=12, **sampling)[0, ids.shape[1] :]
    asked = requests(("The Union", {"until": [], "max_gen_toks": 12, **sampling}))
    [found] = model(sidecar("llama")).generate_until(asked, disable_tqdm=True)
    assert found == tokenizer.decode(new, skip_special_tokens=True)


def test_a_trained_base_is_scored_as_it_was_saved(model_dir, tmp_path):
    """With LoRA and whole layers, as phases B and C leave them; step 0 is the trained base."""
    base = with_tokenizer(make_base("llama"), tmp_path, model_dir)
    wrapper = adapted(base, layers=[0])
    save_sidecar(wrapper, tmp_path, tmp_path / "base")
    ids = torch.tensor([[5, 7, 5, 9, 11, 40, 41, 42, 43, 44]])
    with torch.no_grad():
        for num_steps in (0, 3):
            lm = model(tmp_path, num_steps)
            expected = wrapper(ids, num_steps=num_steps).logits
            torch.testing.assert_close(lm._model_call(ids), expected)
        plain = model(tmp_path / "base", 0)._model_call(ids)
    assert (plain - wrapper(ids, num_steps=0).logits).abs().max() > 1e-2


def test_what_cannot_be_is_one_line(sidecar, model_dir, tmp_path):
    folder = sidecar("gpt2")
    make_base("llama").save_pretrained(tmp_path / "mute")
    cases = [
        ({"num_step": 2}, "model_args: no such option: num_step; allowed: path, num_steps, commit"),
        ({"peft": "x"}, "no such option: peft"),
        ({"num_steps": -1}, "num_steps must be a whole number from 0, got -1"),
        ({"num_steps": "two"}, "got 'two'"),
        ({"num_steps": True}, "got True"),
        ({"commit": "always"}, "commit must be one of verified, learned, got 'always'"),
        ({"commit": "learned", "num_steps": 2}, "leave num_steps out"),
        ({"path": folder / "base", "num_steps": 2}, "has no sidecar, so num_steps must be 0"),
        ({"path": tmp_path / "none"}, "none: no such model directory"),
        ({"path": tmp_path / "mute"}, "mute: has no tokenizer; tokenizer=FOLDER names one"),
        ({"tokenizer": str(tmp_path)}, f"{tmp_path}: has no tokenizer"),
        ({"max_length": 129}, "max_length: 129 tokens are more than the base's 128 positions"),
    ]
    for changes, message in cases:
        options = {"path": folder, **changes}
        error = error_of(lambda options=options: model(options.pop("path"), **options))
        assert message in error
    assert "path=FOLDER is missing" in error_of(RecursiveLM)
    named = model(tmp_path / "mute", tokenizer=str(model_dir / "tokenizer"))
    assert named.num_steps == 0 and named.tok_encode("a")
    lm = model(folder, 2)
    for kwargs, message in (
        ({"max_gen_toks": CONTEXT}, "max_gen_toks = 48 leaves no room for a prompt in max_length"),
        ({"num_beams": 4, "max_gen_toks": 4}, "not available at num_steps=2: num_beams"),
    ):
        assert message in error_of(lm.generate_until, requests(("It is", kwargs)), True)
    long = requests(("It is", TEXT * 2))
    assert "more than max_length = 48" in error_of(lm.loglikelihood, long, True)


def test_the_command_runs_a_task_with_our_model_and_reports_errors(
    sidecar, corpus, monkeypatch, capsys, tmp_path
):
    only_ours = {"include_defaults": False}  # reading the others takes 5 s
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, **only_ours))
    given = ["--include_path", TASKS, "--tasks", "sotu_perplexity", "--device", "cpu"]
    given += ["--metadata", f"corpus={corpus}", "--output_path", tmp_path, "--log_samples"]
    path = f"path={sidecar('llama')},max_length={CONTEXT}"
    assert call(monkeypatch, "lm-eval", *given, "--model_args", f"{path},num_steps=1") == 0
    assert "kimi_recursive (" in capsys.readouterr().out
    [file] = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["sotu_perplexity"]["byte_perplexity,none"] > 1
    assert found["config"]["num_steps"] == 1
    assert found["config"]["recursive_config"]["chunk_width"] == 8
    for arguments, message in (
        (["--model_args", f"{path},num_steps=x"], "error: num_steps must be a whole number"),
        (["--model_args", path, "--metadata", "corpus=no"], "error: no: no such file"),
        (["--model_args", path, "--tasks", "nothing"], "error: Tasks not found: nothing"),
    ):
        assert call(monkeypatch, "lm-eval", "run", *given, *arguments) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    assert call(monkeypatch, "lm-eval", "ls", "tasks") == 2
    assert "pip install 'kimi-recursive[eval]'" in capsys.readouterr().err


def test_nothing_imports_the_harness_unasked():
    code = "import sys, kimi_recursive.cli.app; print('lm_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
    package = (ROOT / "kimi_recursive").rglob("*.py")
    naming = {
        f.name
        for f in package
        if "lm_eval" in f.read_text() and f.name not in ("app.py", "__init__.py")
    }
    assert naming == {"harness.py", "lm_eval.py", "tasks.py", "task_names.py"}
