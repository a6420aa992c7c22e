"""`kimi-recursive upload`, against a Hub on 127.0.0.1, and loading what was published."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, call, random_ids
from hub_client import Client
from hub_server import TOKEN, Fault, Hub
from huggingface_hub import ModelCard

from kimi_recursive import RecursiveConfig, load_model_with_config
from kimi_recursive.hub import _without_private_paths
from kimi_recursive.loader import sidecar_facts

BEST = "checkpoints/best/model"


@pytest.fixture(scope="module")
def lab(model_dir, tmp_path_factory, client, lfs_client) -> Path:
    """Experiments a, b and c by hand, each trained from the one before; meanwhile the clients
    import what they need."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(model_dir / "base", root / "base")
    RecursiveConfig(**{**SMALL, "max_inner_steps": 2}).save(root / "config.json")
    more = {
        "a": ["--recursive-config", root / "config.json"],
        "b": ["--lora-rank", 2],
        "c": ["--unfreeze-every", 2],
    }
    parent = root / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for phase, options in more.items():
            code = call(
                patch, "run-experiment", "--experiment-name", phase, "--model-path", parent,
                "--phase", phase, "--num-steps", 4, "--save-interval", 2, "--eval-interval", 2,
                "--batch-size", 2, "--context-length", 16, "--num-validation-windows", 2,
                "--lr", 0.01, "--corpus", model_dir / "docs", *options,
            )  # fmt: skip
            assert code == 0
            parent = root / "experiments" / phase / BEST
    return root


@pytest.fixture
def experiment(lab, tmp_path) -> Path:
    """A copy of experiment a, with its base, that a test may damage."""
    shutil.copytree(lab / "base", tmp_path / "lab/base")
    return shutil.copytree(lab / "experiments/a", tmp_path / "lab/experiments/a", symlinks=True)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub") / "xet") as hub:
        yield hub


@pytest.fixture(autouse=True)
def healthy(hub):
    hub.faults.clear()
    hub.log.clear()


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Uploads and downloads as huggingface_hub does by default: through Xet."""
    with Client(hub.url, tmp_path_factory.mktemp("client") / "xet") as client:
        yield client
        assert TOKEN not in client.printed.read_text()


@pytest.fixture(scope="module")
def lfs_client(hub, tmp_path_factory):
    """Through git LFS, as without hf_xet."""
    folder = tmp_path_factory.mktemp("client") / "lfs"
    with Client(hub.url, folder, HF_HUB_DISABLE_XET="1") as client:
        yield client
        assert TOKEN not in client.printed.read_text()


def upload(client, directory, repo, *options, **keywords):
    return client.run(
        "upload", "--experiment-dir", directory, "--hf-repo", repo, *options, **keywords
    )


def dry_run(monkeypatch, directory, output, *options, repo="user/name"):
    arguments = ["--experiment-dir", directory, "--hf-repo", repo, "--dry-run"]
    return call(monkeypatch, "upload", *arguments, "--output-dir", output, *options)


def published(client, repo: str, folder: Path, **options) -> tuple[torch.Tensor, Path]:
    """Logits of the model on the Hub, and the folder that its files were downloaded to; its base is
    taken at the revision that it names."""
    code = f"""
import torch
from kimi_recursive import load_model_with_config
from kimi_recursive.loader import local_model
model, tokenizer, _ = load_model_with_config({repo!r}, **{options!r})
ids = torch.load({str(folder / "ids.pt")!r})
fetched, of_base = local_model({repo!r}, {options.get("revision")!r})
torch.save((model.step_logits(ids), str(fetched), of_base), {str(folder / "logits.pt")!r})
assert tokenizer is not None
"""
    torch.save(random_ids(2, 8), folder / "ids.pt")
    status, output = client.run(code=code)
    assert status == 0, output
    logits, fetched, of_base = torch.load(folder / "logits.pt")
    if fetched != repo:
        assert of_base == sidecar_facts(fetched)["revision"]
    return logits, Path(fetched)


def local_logits(directory: Path) -> torch.Tensor:
    return load_model_with_config(directory)[0].step_logits(random_ids(2, 8))


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


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
        "README.md", "sidecar.safetensors", "recursive_config.json", "experiment_metadata.json",
        "notes/notes.txt", "notes/issues.txt", "notes/generation_samples.jsonl",
    }  # fmt: skip
    for name, content in found.items():
        assert f"{len(content):,}  {name}\n" in printed.out
    assert "nothing was sent" in printed.out and "the base is a folder here" in printed.err
    assert files(experiment) == before
    assert found["notes/notes.txt"] == b"plateau after step 2, see loss.png, 3/4 of the way\n"
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
    digest = sidecar_facts(tmp_path / "out")["base"]["embedding_sha256"]
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
    facts = sidecar_facts(tmp_path / "out")
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("org/base", "v1")
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
    run, name = ("vanilla_b_s0", "finetuned_vanilla_b") if control else (
        "recursive_b_s0", "finetuned_recursive_b")  # fmt: skip
    monkeypatch.chdir(project.folder)
    assert dry_run(monkeypatch, f"results/runs/{run}/work", tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    verdicts = json.loads((results / "verdicts.json").read_text())
    ours = [v for v in verdicts if name in (v["arm"], v["reference"])]
    assert len(ours) == (1 if control else 5)
    for v in ours:
        mean, low, high = v["perplexity_percent"]
        assert (
            f"| `{v['arm']}` | `{v['reference']}` | {mean:+.3f} % | [{low:+.3f}, {high:+.3f}] % "
            f"| **{v['verdict']}** |\n"
        ) in card.text
    assert card.text.count(" **") == len(ours) and "Not known" not in card.text
    scored = json.loads((results / f"eval/{name}_results.json").read_text())
    last = f"Perplexity at inner step {scored['inner_steps']}"
    assert metric(card, "test", last) == round(scored["perplexity"]["perplexity"], 4)


@pytest.mark.workflow
def test_results_that_contradict_each_other_are_not_published(copy, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(copy.folder)
    work, out = "results/runs/recursive_a_s0/work", tmp_path / "out"
    path = Path("results/eval/finetuned_vanilla_results.json")
    values = json.loads(path.read_text())
    values["perplexity"]["perplexity"] += 1e-3
    path.write_text(json.dumps(values))
    assert dry_run(monkeypatch, work, out) == 2
    assert "verdicts.json: was made from another evaluation than" in capfd.readouterr().err
    other = "results/runs/vanilla_a_s0/sidecar/sidecar.safetensors"
    shutil.copy(other, "results/runs/recursive_a_s0/sidecar/sidecar.safetensors")
    assert dry_run(monkeypatch, work, out) == 2
    assert "is an evaluation of other weights than" in capfd.readouterr().err
    assert dry_run(monkeypatch, "results/base/work", out) == 2
    assert "holds no sidecar, but a model of another kind" in capfd.readouterr().err


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["a", "b", "c"])
def test_what_is_uploaded_loads_by_its_id(lab, hub, client, phase, tmp_path, monkeypatch):
    directory, repo = lab / "experiments" / phase, f"user/round-trip-{phase}"
    status, output = upload(client, directory, repo, "--include-base")
    assert status == 0, output
    assert f"uploaded to {hub.url}/{repo}/commit/" in output
    logits, fetched = published(client, repo, tmp_path)
    assert torch.equal(logits, local_logits(directory / BEST))
    assert dry_run(monkeypatch, directory, tmp_path / "out", "--include-base", repo=repo) == 0
    assert files(fetched) == files(tmp_path / "out")
    adapter = {"a": set(), "b": {"adapter"}, "c": {"adapter", "layers.safetensors"}}[phase]
    assert {path.name for path in fetched.iterdir()} & {"adapter", "layers.safetensors"} == adapter


def test_an_upload_over_lfs_loads_too_and_a_second_one_sends_nothing(
    lab, hub, lfs_client, tmp_path
):
    directory, repo = lab / "experiments/a", "user/over-lfs"
    for _ in range(2):
        status, output = upload(lfs_client, directory, repo, "--include-base")
        assert status == 0, output
    assert len(hub.sent("PUT", "/lfs/")) == 2 and len(hub.repos[repo].messages) == 1
    logits, fetched = published(lfs_client, repo, tmp_path)
    assert torch.equal(logits, local_logits(directory / BEST))
    assert files(fetched) == hub.files(repo)


def test_a_base_on_the_hub_is_named_with_its_revision(lab, hub, client, tmp_path):
    base = hub.add("user/base", files(lab / "base"))
    hub.add("user/base", {"config.json": b"{}"})
    options = ["--base-model", "user/base", "--base-revision", base]
    status, output = upload(client, lab / "experiments/a", "user/named", *options)
    assert status == 0, output
    status, output = upload(client, lab / "experiments/b", "user/named", *options)
    assert status == 0, output
    first = list(hub.repos["user/named"].commits)[1]
    logits, fetched = published(client, "user/named", tmp_path, revision=first)
    assert torch.equal(logits, local_logits(lab / "experiments/a" / BEST))
    logits, _ = published(client, "user/named", tmp_path)
    assert torch.equal(logits, local_logits(lab / "experiments/b" / BEST))
    card = ModelCard.load(fetched / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == ("user/base", "adapter")
    assert sidecar_facts(fetched)["revision"] == base and base in card.text
    from_folder, _ = published(client, str(fetched), tmp_path)
    assert torch.equal(from_folder, local_logits(lab / "experiments/a" / BEST))


def test_branch_message_and_privacy_are_as_asked(lab, hub, client, tmp_path):
    options = ["--revision", "draft", "--commit-message", "try it", "--private", "--include-base"]
    status, output = upload(client, lab / "experiments/a", "user/secret", *options)
    assert status == 0, output
    repo = hub.repos["user/secret"]
    assert repo.private and repo.messages == ["try it"]
    assert repo.commits[repo.branches["main"]] == {}
    card = hub.files("user/secret", "draft")["README.md"].decode()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'load_model_with_config("user/secret", revision="draft")' in code
    status, output = client.run(code=code, token="hf_nobody")
    assert status == 1 and "ValueError: user/secret: " in output
    status, output = client.run(code=code)
    assert status == 0, output
    logits, _ = published(client, "user/secret", tmp_path, revision="draft")
    assert torch.equal(logits, local_logits(lab / "experiments/a" / BEST))


# ---- faults -------------------------------------------------------------------------------------


def error_line(output: str) -> str:
    """The only error, which is the last line; there is no traceback."""
    lines = output.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in output, output
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert TOKEN not in output
    return lines[-1]


COMMIT, LFS = r"/commit/main$", "/lfs/"
TELLTALE = {"X-Error-Message": f"{TOKEN} is bad"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST", "/repos/create", 401), "not made: the token is not valid"),
        (Fault("POST", "/repos/create", 403), "the token may not write there (HTTP 403"),
        (Fault("POST", COMMIT, 400, headers=TELLTALE), "the Hub refused (HTTP 400: <token> is bad"),
        (Fault("POST", "/preupload/", 404), "the upload stopped: there is no such repository"),
        (Fault("POST", "/repos/create", 429), "too many requests; wait some minutes (HTTP 429"),
        (Fault("POST", "/validate-yaml", 500), "the model card was not checked: the Hub failed"),
        (Fault("PUT", LFS, 413, after=1), "the upload stopped: the Hub refused (HTTP 413"),
        (Fault("POST", COMMIT, 500), "the upload stopped: the Hub failed (HTTP 500: as ordered"),
        (Fault("POST", COMMIT), "the upload stopped: http"),
        (Fault("POST", COMMIT, late=True), "the upload stopped: http"),
    ],
    ids=str,
)  # fmt: skip
def test_after_an_error_the_same_command_goes_on(lab, hub, lfs_client, fault, message, request):
    repo = f"user/fault-{request.node.callspec.indices['fault']}"
    hub.objects.clear()
    hub.faults.append(fault)
    directory = lab / "experiments/c"
    status, output = upload(lfs_client, directory, repo)
    assert status == 2
    line = error_line(output)
    assert line.startswith(f"error: {repo}: ") and message in line
    assert line.endswith("; repeated, the command goes on and does not send again what is there")
    stored = len(hub.objects)
    hub.faults.clear()
    hub.log.clear()
    status, output = upload(lfs_client, directory, repo)
    assert status == 0, output
    assert len(hub.sent("PUT", LFS)) == 3 - stored  # sidecar, adapter, layers
    assert len(hub.repos[repo].messages) == 1
    assert len(hub.files(repo)) == 10


@pytest.mark.parametrize("status", [429, 500, None])
def test_what_passes_is_waited_for(lab, hub, lfs_client, status):
    hub.objects.clear()
    hub.faults.append(Fault("PUT", LFS, status, times=1, headers={"Retry-After": 0}))
    code, output = upload(lfs_client, lab / "experiments/a", f"user/passes-{status}")
    assert code == 0, output
    assert len(hub.objects) == 1 and not hub.faults[0].times


def test_xet_is_cut_off_and_goes_on(lab, hub, client, tmp_path):
    directory, repo = lab / "experiments/a", "user/cut-xet"
    options = ["--include-base"]
    for fault in (Fault("GET", "/xet-write-token/", 401), Fault("POST", COMMIT, 413)):
        hub.faults[:] = [fault]
        status, output = upload(client, directory, repo, *options)
        assert status == 2
        assert "the upload stopped: " in error_line(output)
    hub.faults[:] = [Fault("POST", COMMIT, times=1)]  # over Xet a commit is tried again
    status, output = upload(client, directory, repo, *options)
    assert status == 0, output
    assert torch.equal(published(client, repo, tmp_path)[0], local_logits(directory / BEST))


def test_tokens_that_are_wrong(lab, hub, client):
    directory, repo = lab / "experiments/a", "user/unauthorised"
    status, output = upload(client, directory, repo, token="hf_wrong")
    assert status == 2 and "the token is not valid (HTTP 401" in error_line(output)
    status, output = upload(client, directory, repo, token="")
    assert status == 2 and "no token: set HF_TOKEN" in error_line(output)
    broken = f"{TOKEN}\nX-Evil: 1"
    status, output = upload(client, directory, repo, "--hf-token", broken)
    assert status == 2 and "holds characters that no token has" in error_line(output)
    assert "Evil" not in output and repo not in hub.repos
    status, output = upload(client, directory, repo, "--hf-token", TOKEN, token="hf_wrong")
    assert status == 0, output


def test_a_card_that_the_hub_refuses_leaves_no_repository(lab, hub, client):
    status, output = upload(client, lab / "experiments/a", "user/bad", "--license", "none of it")
    assert status == 2 and "the model card was not checked: " in error_line(output)
    assert "license" in error_line(output) and "user/bad" not in hub.repos


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
        (["--output-dir", "out"], "--output-dir is where --dry-run writes"),
        (["--hf-token", TOKEN], "HF_HUB_OFFLINE is set: nothing can be sent"),
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
    assert "is there and not of an earlier --dry-run" in capfd.readouterr().err
    assert files(mine) == {"README.md": b"mine"}
    given = ["upload", "--experiment-dir", experiment, "--hf-repo", "user/name", "--dry-run"]
    assert call(monkeypatch, *given) == 0
    first = files(experiment / "hub")
    (experiment / "hub/old").touch()
    assert call(monkeypatch, *given) == 0
    assert files(experiment / "hub") == first


# ---- the README ---------------------------------------------------------------------------------


@pytest.mark.workflow
def test_the_commands_of_the_readme_run(copy, hub, client):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.split("## Publish a model\n")[1].split("\n## ")[0]
    shell, code = re.search(r"```\n(.*?)```.*?```python\n(.*?)```", section, re.DOTALL).groups()
    commands = [c.split() for c in shell.replace("\\\n", " ").splitlines() if "upload" in c]
    assert len(commands) == 2 and "--dry-run" in commands[0]
    for command in commands:
        assert command[0] == "kimi-recursive"
        status, output = client.run(*command[1:], cwd=copy.folder)
        assert status == 0, output
    status, output = client.run(code=code, cwd=copy.folder)
    assert status == 0, output
    assert os.listdir(copy.folder / "results/runs/recursive_a_s0/work/hub")
