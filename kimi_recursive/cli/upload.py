"""`kimi-recursive upload`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kimi_recursive.files import publishing

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def upload(
    experiment_dir: Annotated[
        Path,
        typer.Option(help="experiments/NAME, or results/runs/KEY/work of a run of the workflow."),
    ],
    hf_repo: Annotated[str, typer.Option(help="USER/NAME on the Hub; created if missing.")],
    hf_token: Annotated[
        str | None,
        typer.Option(
            help="Prefer the environment variable HF_TOKEN, or `hf auth login`: other users of the "
            "machine can read a command line in its process list.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch; created if missing. Default: main.")
    ] = None,
    commit_message: Annotated[
        str | None, typer.Option(help="Default: the experiment and the step.")
    ] = None,
    results_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with evaluations of the experiment (STAGE_results.json, also in eval/) "
            "and verdicts.json. Default: for a run of the workflow, its results."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the base, if the sidecar names a local folder."),
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="Revision of --base-model; pin it.")
    ] = None,
    include_base: Annotated[
        bool,
        typer.Option("--include-base", help="Publish the base's local folder too, as base/."),
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="For the model card, such as apache-2.0.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write and list the folder; send nothing.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for --dry-run. Default: EXPERIMENT_DIR/hub.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish an experiment that is not completed.")
    ] = False,
) -> None:
    """Publish the best checkpoint of an experiment on the Hugging Face Hub.

    The repository gets weights as safetensors, the config, the experiment's metadata and notes,
    and a model card with the scores and the verdict. After an error, give the same command again:
    it sends only what is missing. `load_model_with_config("USER/NAME")` loads the result.
    """
    if not sys.stderr.isatty():  # bars in a log bury the line that matters
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(hf_repo)
    if "/" not in hf_repo:
        raise ValueError(f"--hf-repo: must be USER/NAME, got '{hf_repo}'")
    if base_model is not None:
        validate_repo_id(base_model)
    if output_dir is not None and not dry_run:
        raise ValueError("--output-dir needs --dry-run: an upload keeps no folder")
    token = (hf_token or get_token() or "").strip()
    if not dry_run and constants.HF_HUB_OFFLINE:
        raise ValueError(
            "HF_HUB_OFFLINE is set, so nothing can be sent; --dry-run writes the folder"
        )
    if not dry_run and not token:
        raise ValueError(
            "no token: set HF_TOKEN to a token with write access, or run `hf auth login`"
        )
    if not all(33 <= ord(character) < 127 for character in token):
        raise ValueError("the token has an invalid character, such as a line break")

    from kimi_recursive.hub import upload as hub

    branch = None if revision == constants.DEFAULT_REVISION else revision
    experiment = hub.read_experiment(experiment_dir, force)
    base = hub.choose_base(experiment, base_model, base_revision, include_base)

    if base[0].name is None:
        typer.echo(
            "note: the base is a local folder and will not be published; publish it with "
            "--include-base, or name its Hub id with --base-model",
            err=True,
        )

    def gather(folder: Path) -> ModelCard:
        return hub.gather(experiment, folder, hf_repo, branch, results_dir, base, license)

    if dry_run:
        target = output_dir or experiment_dir / "hub"
        if target.exists() and not hub.is_gathered(target):
            raise ValueError(f"{target}: exists, but no --dry-run wrote it; choose another folder")
        with publishing(target) as folder:
            gather(folder)
        _list(target)
        typer.echo(f"wrote {target}; nothing was sent")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        card = gather(folder)
        _list(folder)
        name = experiment.metadata["experiment_name"]
        message = commit_message or f"{name}: checkpoint of step {experiment.step}"
        url = hub.upload(folder, card, hf_repo, token, branch, private, message)
    typer.echo(f"uploaded to {url}")


def _list(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        typer.echo(f"{path.stat().st_size:>14,}  {path.relative_to(folder)}")
    typer.echo(f"{sum(path.stat().st_size for path in files):>14,}  bytes in {len(files)} files")
