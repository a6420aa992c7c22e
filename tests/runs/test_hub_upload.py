"""`kimi-recursive upload` against a Hub on 127.0.0.1, and loading what was uploaded."""

import os
import re
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_lab import BEST, dry_run, error_line, files, local_logits, make_experiments
from hub_server import TOKEN, Fault, Hub
from huggingface_hub import ModelCard
from models import random_ids

from kimi_recursive.model.sidecar import Sidecar


@pytest.fixture(scope="module")
def lab(model_dir, tmp_path_factory, client, lfs_client) -> Path:
    """Made while the clients import what they need."""
    return make_experiments(tmp_path_factory.mktemp("lab"), model_dir, "abc")


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


def published(client, repo: str, folder: Path, **options) -> tuple[torch.Tensor, Path]:
    """Logits of the model on the Hub, and the folder that its files were downloaded to; its base is
    taken at the revision that it names."""
    code = f"""
import torch
from kimi_recursive import load_model_with_config
from kimi_recursive.model.loading import local_model
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
        assert of_base == Sidecar.open(fetched).revision
    return logits, Path(fetched)


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
    assert Sidecar.open(fetched).revision == base and base in card.text
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
    assert line.endswith("; to continue, repeat the command: files that arrived are not sent again")
    stored = len(hub.objects)
    hub.faults.clear()
    hub.log.clear()
    status, output = upload(lfs_client, directory, repo)
    assert status == 0, output
    assert len(hub.sent("PUT", LFS)) == 3 - stored  # sidecar, adapter, layers
    assert len(hub.repos[repo].messages) == 1
    assert len(hub.files(repo)) == 11


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
    assert status == 2 and "has an invalid character" in error_line(output)
    assert "Evil" not in output and repo not in hub.repos
    status, output = upload(client, directory, repo, "--hf-token", TOKEN, token="hf_wrong")
    assert status == 0, output


def test_a_card_that_the_hub_refuses_leaves_no_repository(lab, hub, client):
    status, output = upload(client, lab / "experiments/a", "user/bad", "--license", "none of it")
    assert status == 2 and "the model card was not checked: " in error_line(output)
    assert "license" in error_line(output) and "user/bad" not in hub.repos


# ---- the page on publishing ---------------------------------------------------------------------


@pytest.mark.workflow
def test_the_commands_of_the_page_run(copy, hub, client):
    page = (Path(__file__).parents[2] / "docs/publishing.md").read_text()
    section = page.split("## Publish a model\n")[1].split("\n## ")[0]
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
