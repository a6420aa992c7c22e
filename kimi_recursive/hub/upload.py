"""Publish the best checkpoint of an experiment: gather a folder, and send it to the Hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]
)

from kimi_recursive.files import read_json_object, write_json, write_text
from kimi_recursive.hub.model_card import Base, Published, model_card
from kimi_recursive.hub.results import read_comparisons, read_scores, workflow_results
from kimi_recursive.layout import SIDECAR_NAME
from kimi_recursive.model.sidecar import Sidecar, write_native_config
from kimi_recursive.training.checkpoint import MODEL_DIR, verify_checkpoint
from kimi_recursive.training.experiment import METADATA_NAME

CARD_NAME = "README.md"
BASE_DIR = "base"
ORIGIN_NAME = "origin.json"  # says where the workflow fetched a pretrained base
PRIVATE_KEYS = ("host",)
# A path outside the project, in the middle of a text.
PRIVATE_PATH = re.compile(r"(?<![\w.~/])(?:file://|~|\.\./|/[^\s/'\"]+/|[A-Za-z]:\\)[^\s'\",;()]*")
BASE_FILES = (
    "*.safetensors", "*.json", "*.model", "*.tiktoken", "*.jinja", "*.py",
    "merges.txt", "vocab.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """What is published of an experiment directory.

    Attributes:
        metadata: `experiment_metadata.json`.
        step: Of the best checkpoint.
        model_dir: Its model.
        files: Of the model, relative to `model_dir`, checked against their checksums.
    """

    directory: Path
    metadata: dict[str, Any]
    step: int
    model_dir: Path
    files: list[str]


def read_experiment(directory: Path, force: bool = False) -> Experiment:
    """Find and check the best checkpoint of an experiment directory.

    Args:
        force: Accept an experiment that is not completed.

    Raises:
        ValueError: the directory holds no experiment, the experiment is not completed, or its best
            checkpoint is missing, damaged or without a sidecar.
    """
    if not (directory / METADATA_NAME).is_file():
        raise ValueError(
            f"{directory}: is no experiment directory (no {METADATA_NAME}); such a directory is "
            "experiments/NAME, or results/runs/KEY/work of the workflow"
        )
    metadata = read_json_object(directory / METADATA_NAME)
    status, step = metadata.get("status"), metadata.get("best_checkpoint_step")
    if step is None:
        raise ValueError(
            f"{directory}: has no best checkpoint (best_checkpoint_step); status: {status}"
        )
    if status != "completed" and not force:
        raise ValueError(
            f"{directory}: is not completed (status: {status}); --force publishes the best "
            "checkpoint so far, and the card says so"
        )
    checkpoint = directory / "checkpoints" / f"step_{step:06d}"
    if not checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint}: no such checkpoint, though {METADATA_NAME} names it as the best"
        )
    try:
        names = verify_checkpoint(checkpoint, f"{MODEL_DIR}/")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint}: is damaged ({str(error).splitlines()[0]})") from error
    model_dir, files = checkpoint / MODEL_DIR, [n.removeprefix(f"{MODEL_DIR}/") for n in names]
    if SIDECAR_NAME not in files:
        raise ValueError(
            f"{model_dir}: holds no sidecar, but a model of another kind; "
            f"`hf upload USER/NAME {model_dir}` publishes such a folder as it is"
        )
    return Experiment(directory, metadata, step, model_dir, files)


def choose_base(
    experiment: Experiment,
    base_model: str | None = None,
    base_revision: str | None = None,
    include: bool = False,
) -> tuple[Base, Path | None]:
    """Decide which base the published sidecar names.

    Args:
        base_model, base_revision: A Hub id for a base that is a local folder here.
        include: Publish that folder too.

    Returns: the base, and the local folder to copy or None.

    Raises:
        ValueError: the base is on the Hub already, or its folder is missing.
    """
    sidecar = Sidecar.open(experiment.model_dir)
    fingerprint = experiment.directory / "fingerprint.json"
    load = read_json_object(fingerprint).get("load", {}) if fingerprint.is_file() else {}
    remote_code = bool(load.get("trust_remote_code"))
    name, revision = sidecar.base_name, sidecar.revision
    if name is not None:
        name = sidecar.base_path()
    folder = Path(name) if name is not None and Path(name).is_absolute() else None
    if folder is not None:  # a local folder, though the workflow may have it from the Hub
        origin = folder / ORIGIN_NAME
        origin = read_json_object(origin) if origin.is_file() else {}
        name, revision = origin.get("hub_id"), origin.get("revision")
    if name is not None and (include or base_model not in (None, name)):
        raise ValueError(
            f"{experiment.model_dir}: its base is {name} on the Hub; leave out --base-model and "
            "--include-base"
        )
    if include and base_model:
        raise ValueError("give either --base-model or --include-base")
    if include:
        if folder is None or not any(folder.glob("*.safetensors")):
            raise ValueError(f"--include-base: {folder}: holds no model as safetensors")
        return Base(BASE_DIR, None, True, remote_code), folder
    name, revision = name or base_model, base_revision or revision
    return Base(name, revision if name else None, False, remote_code), None


def gather(
    experiment: Experiment,
    folder: Path,
    repo_id: str,
    branch: str | None = None,
    results_dir: Path | None = None,
    base: tuple[Base, Path | None] | None = None,
    license: str | None = None,
) -> ModelCard:
    """Write the files to publish into a folder. Equal experiments give equal files.

    Args:
        folder: Exists and is empty.
        branch: If it is not `main`.
        results_dir: Holds evaluations and comparisons. Default: the workflow's results, if the
            experiment is one of its runs.
        base: From `choose_base`.

    Raises:
        ValueError: results are damaged or contradict each other.
    """
    named, base_folder = base or choose_base(experiment)
    sidecar, metadata = Sidecar.open(experiment.model_dir), experiment.metadata
    given = results_dir is not None
    results_dir = results_dir or workflow_results(experiment.directory)
    scores = read_scores(
        experiment.directory, metadata, experiment.step, experiment.model_dir, results_dir
    )
    if given and not any(s.name for s in scores):
        raise ValueError(f"--results-dir {results_dir}: holds no evaluation of this experiment")
    seed = (metadata.get("training_params") or {}).get("seed")
    comparisons = read_comparisons(results_dir, scores, seed)

    for name in experiment.files:
        if name != SIDECAR_NAME:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(experiment.model_dir / name, folder / name)
    write_native_config(folder)  # checkpoints of before have none
    sidecar.renamed(named.name, named.revision, folder / SIDECAR_NAME)
    if base_folder is not None:
        _copy_base(base_folder, folder / BASE_DIR)
    public = _public(metadata)
    write_json(folder / METADATA_NAME, public)
    notes = experiment.directory / "notes"
    (folder / "notes").mkdir()
    for path in sorted(notes.glob("*")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".txt":
            text = _without_private_paths(text)
        write_text(folder / "notes" / path.name, text)

    changes = [
        f"`{SIDECAR_NAME}` names its base as this page does; its tensors are the checkpoint's",
        f"`{METADATA_NAME}` has no `{'`, `'.join(PRIVATE_KEYS)}`; in that file and in the notes, "
        "a path outside the project is cut down to its last part",
    ]
    card = model_card(
        Published(
            repo_id, branch, license, public, experiment.step, sidecar, named, scores, comparisons,
            changes,
        )
    )  # fmt: skip
    write_text(folder / CARD_NAME, str(card))
    return card


def is_gathered(folder: Path) -> bool:
    """Whether a folder is empty, or holds what `gather` wrote."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {None}
    return not names or names >= {CARD_NAME, SIDECAR_NAME, METADATA_NAME}


def _copy_base(source: Path, target: Path) -> None:
    """Copy model and tokenizer files, and no others."""
    target.mkdir()
    for path in sorted(file for pattern in BASE_FILES for file in source.glob(pattern)):
        if path.name != ORIGIN_NAME:
            shutil.copy(path, target / path.name)
    for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        values = read_json_object(target / name) if (target / name).is_file() else {}
        if values.get(key):
            write_json(target / name, values | {key: _public_path(values[key])})


def _public(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an experiment, without the machine and the paths it was made at."""
    kept = {key: value for key, value in metadata.items() if key not in PRIVATE_KEYS}
    paths = kept.get("paths") or {}
    kept["paths"] = {k: v and ", ".join(map(_public_path, v.split(", "))) for k, v in paths.items()}
    return _without_private_paths(kept)


def _public_path(path: str) -> str:
    private = path.startswith(("~", "..")) or Path(path).is_absolute()
    return Path(path).name if private else path


def _without_private_paths(value: Any) -> Any:
    """Text, or JSON values, with paths outside the project cut down to their last part."""
    if isinstance(value, str):
        return PRIVATE_PATH.sub(lambda m: re.split(r"[/\\]", m[0].rstrip("/\\"))[-1], value)
    if isinstance(value, Mapping):
        return {key: _without_private_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_private_paths(item) for item in value]
    return value


def upload(
    folder: Path,
    card: ModelCard,
    repo_id: str,
    token: str,
    branch: str | None = None,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Send a folder to a model repository of the Hub as one commit; make the repository if needed.

    Files that the Hub has already are not sent again, so after an error the same call continues.

    Args:
        branch: Made from `main` if it does not exist.
        private: Whether a repository that is made is private.

    Returns: the address of the commit.

    Raises:
        ValueError: the Hub refused or could not be reached. The message never holds the token.
    """
    api = HfApi(token=token)
    with _explained(f"{repo_id}: the model card was not checked", token):
        card.validate()
    with _explained(f"{repo_id}: the repository was not made", token):
        api.create_repo(repo_id, private=private, exist_ok=True)
    if branch is not None:
        with _explained(f"{repo_id}: the branch {branch} was not made", token):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
    with _explained(f"{repo_id}: the upload stopped", token):
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=branch, commit_message=message
        )
    return commit.commit_url


@contextmanager
def _explained(what: str, token: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one line, without the token."""
    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason = _reason(error).replace(token, "<token>")
        raise ValueError(
            f"{what}: {reason}; to continue, repeat the command: "
            "files that arrived are not sent again"
        ) from None


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _reason(error.__cause__)  # the reason for one file among several
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if not isinstance(error, HfHubHTTPError):
        at = "" if isinstance(error, ValueError) else f"{constants.ENDPOINT}: "
        return f"{at}{message} ({type(error).__name__})"
    code = error.response.status_code
    known = {
        401: "the token is not valid",
        403: "the token may not write there",
        404: "there is no such repository, or the token may not see it",
        429: "too many requests; wait some minutes",
    }
    said = (error.server_message or "").strip().splitlines()
    reason = known.get(code) or ("the Hub failed" if code >= 500 else "the Hub refused")
    return f"{reason} (HTTP {code}{': ' + said[0] if said else ''})"
