"""What `kimi-recursive upload` gathers: the folder and its model card, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import call
from hub_lab import BEST, dry_run, error_line, files, local_logits, make_experiments
from hub_server import TOKEN
from huggingface_hub import ModelCard
from models import random_ids

from kimi_recursive import load_model_with_config
from kimi_recursive.hub.upload import _without_private_paths
from kimi_recursive.model.sidecar import Sidecar


@pytest.fixture(scope="module")
def lab(model_dir, tmp_path_factory) -> Path:
    return make_experiments(tmp_path_factory.mktemp("lab"), model_dir, "ab")


@pytest.fixture
def experiment(lab, tmp_path) -> Path:
    """A copy of experiment a, with its base, that a test may damage."""
    shutil.copytree(lab / "base", tmp_path / "lab/base")
    return shutil.copytree(lab / "experiments/a", tmp_path / "lab/experiments/a", symlinks=True)


def metric(card: ModelCard, split: str, name: str) -> float:
    [value] = [
        r.metric_value
        for r in card.data.eval_results
        if (r.dataset_split, r.metric_name) == (split, name)
    ]
    return value


# ---- the folder ---------------------------------------------------------------------------------


def test_the_folder_of_a_dry_run(lab, experiment, tmp_path, monkeypatch, capfd):
    notes = experiment / "notes/notes.txt"
    notes.write_text(f"plateau after step 2, see {tmp_path}/plots/loss.png, 3/4 of the way\n")
    before = files(experiment)
    assert dry_run(monkeypatch, experiment, tmp_path / "out") == 0
    printed = capfd.readouterr()
    found = files(tmp_path / "out")
    assert found.keys() == {
        "README.md", "sidecar.safetensors", "config.json", "recursive_config.json",
        "experiment_metadata.json",
        "notes/notes.txt", "notes/issues.txt", "notes/generation_samples.jsonl",
    }  # fmt: skip
    for name, content in found.items():
        assert f"{len(content):,}  {name}\n" in printed.out
    assert "nothing was sent" in printed.out and "the base is a local folder" in printed.err
    assert files(experiment) == before
    assert found["notes/notes.txt"] == b"plateau after step 2, see loss.png, 3/4 of the way\n"
    card = found["README.md"].decode()
    assert "load_model_with_config(" in card and "AutoModelForCausalLM.from_pretrained(" in card
    assert found["recursive_config.json"] == (experiment / "recursive_config.json").read_bytes()
    everything = b"".join(found.values()).decode(errors="replace")
    assert str(lab.parent) not in everything and str(tmp_path) not in everything
    metadata = json.loads(found["experiment_metadata.json"])
    original = json.loads((experiment / "experiment_metadata.json").read_text())
    assert "host" in original and "host" not in metadata
    assert (metadata["paths"]["base"], metadata["paths"]["corpus"]) == ("base", "docs")
    kept = ("training_params", "versions", "best_metrics", "final_results", "git_commit")
    assert all(metadata[key] == original[key] for key in kept)


def test_a_folder_whose_base_is_elsewhere_says_so_and_loads_with_it(
    lab, experiment, tmp_path, monkeypatch
):
    assert dry_run(monkeypatch, experiment, tmp_path / "out") == 0
    with pytest.raises(ValueError, match=r"was published without its base; .*base_path"):
        load_model_with_config(tmp_path / "out")
    model, _, _ = load_model_with_config(tmp_path / "out", base_path=lab / "base")
    ids = random_ids(2, 8)
    assert torch.equal(model.step_logits(ids), local_logits(lab / "experiments/a" / BEST))
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.base_model is None and "base_path=base_path" in card.text
    digest = Sidecar.open(tmp_path / "out").base["embedding_sha256"]
    assert digest in card.text


def test_a_folder_with_its_base_loads_alone(lab, experiment, tmp_path, monkeypatch):
    (lab / "base/.git").touch()
    (experiment.parents[1] / "base/train.log").write_text("private")
    config = experiment.parents[1] / "base/config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "_name_or_path": str(tmp_path / "x")})
    )
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--include-base") == 0
    shutil.rmtree(experiment.parents[1])
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert torch.equal(local_logits(moved), local_logits(lab / "experiments/a" / BEST))
    assert not (moved / "base/train.log").exists()
    assert json.loads((moved / "base/config.json").read_text())["_name_or_path"] == "x"


def test_a_base_that_the_workflow_has_from_the_hub_is_named(
    experiment, tmp_path, monkeypatch, capfd
):
    origin = experiment.parents[1] / "base/origin.json"
    origin.write_text(json.dumps({"path": str(tmp_path), "hub_id": None, "revision": None}))
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--include-base") == 0
    assert not (tmp_path / "out/base/origin.json").exists()
    origin.write_text(json.dumps({"path": None, "hub_id": "org/base", "revision": "v1"}))
    assert dry_run(monkeypatch, experiment, tmp_path / "out") == 0
    facts = Sidecar.open(tmp_path / "out")
    assert (facts.base_name, facts.revision) == ("org/base", "v1")
    assert ModelCard.load(tmp_path / "out/README.md").data.base_model == "org/base"
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--include-base") == 2
    assert "its base is org/base on the Hub" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("at /home/me/secret/x.pt: bad", "at x.pt: bad"),
        ("'/home/me/x'", "'x'"),
        ("~/models/base", "base"),
        ("../../me/base, then", "base, then"),
        ("file:///home/me/x", "x"),
        (r"C:\Users\me\x.pt", "x.pt"),
        ("loss 3/4, 12 tok/s, ~5 %", "loss 3/4, 12 tok/s, ~5 %"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("results/base/model", "results/base/model"),
    ],
)
def test_paths_outside_the_project_are_cut_down(text, public):
    assert _without_private_paths({"a": [text]}) == {"a": [public]}


# ---- the card -----------------------------------------------------------------------------------


def test_the_card_of_an_experiment_by_hand(experiment, tmp_path, monkeypatch):
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--license", "mit") == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "no comparison with a control arm was made" in card.text
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "text-generation")
    metadata = json.loads((experiment / "experiment_metadata.json").read_text())
    step = metadata["best_checkpoint_step"]
    assert f"best checkpoint: step {step} of 4" in card.text
    [row] = [r for r in metadata["final_results"]["validation"] if r["step"] == step]
    loss = torch.tensor(row["validation_loss_step_2"], dtype=torch.float64)
    value = metric(card, "validation", "Perplexity at inner step 2")
    assert value == pytest.approx(loss.exp().item(), abs=1e-4)
    assert {r.dataset_name for r in card.data.eval_results} == {"docs"}


def test_the_card_takes_evaluations_by_hand(lab, experiment, tmp_path, monkeypatch, capfd):
    results = tmp_path / "evaluated"
    monkeypatch.chdir(tmp_path)
    evaluate = [
        "evaluate", "--stage", "finetuned_recursive", "--output_dir", results, "--prompt", "x",
        "--corpus", lab.parent / "nothing", "--context-length", 16,
    ]  # fmt: skip
    [documents] = {
        json.loads((experiment / "experiment_metadata.json").read_text())["paths"]["corpus"]
    }
    evaluate[evaluate.index("--corpus") + 1] = documents
    assert call(monkeypatch, *evaluate, "--model_path", f"lab/experiments/a/{BEST}") == 0
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--results-dir", results) == 0
    scored = json.loads((results / "finetuned_recursive_results.json").read_text())["perplexity"]
    card = ModelCard.load(tmp_path / "out/README.md")
    for row in scored["by_step"]:
        value = metric(card, "test", f"Perplexity at inner step {row['step']}")
        assert value == round(row["perplexity"], 4)
    assert f"{scored['num_tokens']:,} tokens of {scored['num_documents']} documents" in card.text
    assert "no comparison with a control arm was made" in card.text
    other = lab / "experiments/b"
    assert dry_run(monkeypatch, other, tmp_path / "b", "--results-dir", results) == 2
    assert "holds no evaluation of this experiment" in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.workflow
def test_the_card_of_a_workflow_run_shows_every_verdict(project, control, tmp_path, monkeypatch):
    results = project.folder / "results"
    run, name = ("single_pass_a_s0", "finetuned_single_pass") if control else (
        "recursive_a_s0", "finetuned_recursive")  # fmt: skip
    monkeypatch.chdir(project.folder)
    assert dry_run(monkeypatch, f"results/runs/{run}/work", tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    verdicts = json.loads((results / "verdicts.json").read_text())
    ours = [v for v in verdicts if name in (v["arm"], v["reference"])]
    assert len(ours) == (1 if control else 4)
    for v in ours:
        mean, low, high = v["perplexity_percent"]
        assert (
            f"| `{v['arm']}` | `{v['reference']}` | {', '.join(map(str, v['seeds']))} "
            f"| {mean:+.3f} % | [{low:+.3f}, {high:+.3f}] % | **{v['verdict']}** |\n"
        ) in card.text
    assert card.text.count(" **") == len(ours) and "Not known" not in card.text
    scored = json.loads((results / f"eval/{name}_results.json").read_text())
    last = f"Perplexity at inner step {scored['inner_steps']}"
    assert metric(card, "test", last) == round(scored["perplexity"]["perplexity"], 4)


@pytest.mark.workflow
def test_results_that_contradict_each_other_are_not_published(copy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(copy.folder)
    work, out = "results/runs/recursive_a_s0/work", tmp_path / "out"
    path = Path("results/eval/finetuned_single_pass_results.json")
    values = json.loads(path.read_text())
    values["perplexity"]["perplexity"] += 1e-3
    path.write_text(json.dumps(values))
    assert dry_run(monkeypatch, work, out) == 2
    assert "verdicts.json: was made from another evaluation than" in capfd.readouterr().err
    other = "results/runs/single_pass_a_s0/sidecar/sidecar.safetensors"
    shutil.copy(other, "results/runs/recursive_a_s0/sidecar/sidecar.safetensors")
    assert dry_run(monkeypatch, work, out) == 2
    assert "is an evaluation of other weights than" in capfd.readouterr().err
    assert dry_run(monkeypatch, "results/base/work", out) == 2
    assert "holds no sidecar, but a model of another kind" in capfd.readouterr().err


# ---- bad input ----------------------------------------------------------------------------------


def change(experiment: Path, **values) -> None:
    path = experiment / "experiment_metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip_a_bit(experiment: Path) -> None:
    path = experiment / BEST / "sidecar.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "experiment_metadata.json").unlink(), "is no experiment directory"),
        (lambda e: change(e, status="running"), "not completed (status: running); --force"),
        (lambda e: change(e, best_checkpoint_step=None), "has no best checkpoint"),
        (lambda e: change(e, best_checkpoint_step=9), "step_000009: no such checkpoint"),
        (flip_a_bit, "is damaged (model/sidecar.safetensors of step"),
    ],
)
def test_experiments_that_cannot_be_published(
    experiment, damage, message, tmp_path, monkeypatch, capfd
):
    damage(experiment)
    assert dry_run(monkeypatch, experiment, tmp_path / "out") == 2
    assert message in error_line(capfd.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_experiment_is_published_only_by_force(experiment, tmp_path, monkeypatch):
    change(experiment, status="interrupted")
    assert dry_run(monkeypatch, experiment, tmp_path / "out") == 2
    assert dry_run(monkeypatch, experiment, tmp_path / "out", "--force") == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "status of the experiment: interrupted (the best checkpoint so far is published)" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hf-repo", "user/na me"], "Repo id must use alphanumeric chars"),
        (["--hf-repo", "name"], "--hf-repo: must be USER/NAME, got 'name'"),
        (["--base-model", "a/b/c"], "Repo id must be in the form"),
        (["--base-model", "a/b", "--include-base"], "either --base-model or --include-base"),
        (["--output-dir", "out"], "--output-dir needs --dry-run"),
        (["--hf-token", TOKEN], "HF_HUB_OFFLINE is set, so nothing can be sent"),
    ],
)
def test_options_that_make_no_sense(experiment, options, message, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = ["upload", "--experiment-dir", experiment, "--hf-repo", "user/name", *options]
    monkeypatch.chdir(experiment)
    sends = "--output-dir" in options or "--hf-token" in options
    assert call(monkeypatch, *given, *([] if sends else ["--dry-run"])) == 2
    error = capfd.readouterr().err
    assert message in error and error.startswith("error: ") and TOKEN not in error
    assert not (experiment / "hub").exists()


def test_a_dry_run_replaces_nothing_but_an_earlier_one(experiment, tmp_path, monkeypatch, capfd):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    assert dry_run(monkeypatch, experiment, mine) == 2
    assert "exists, but no --dry-run wrote it" in capfd.readouterr().err
    assert files(mine) == {"README.md": b"mine"}
    given = ["upload", "--experiment-dir", experiment, "--hf-repo", "user/name", "--dry-run"]
    assert call(monkeypatch, *given) == 0
    first = files(experiment / "hub")
    (experiment / "hub/old").touch()
    assert call(monkeypatch, *given) == 0
    assert files(experiment / "hub") == first
