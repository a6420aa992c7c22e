"""The experiment directory: parameters, environment, metrics and notes of a run.

<experiment>/
    experiment_metadata.json       versions, git commit, host, parameters, status, results
    recursive_config.json
    checkpoints/                   written by `kimi_recursive.training.checkpoint`
    logs/                          TensorBoard, and wandb where it is asked for
    metrics/step_000100.json
    notes/notes.txt                under the six headings of HEADINGS
    notes/issues.txt, generation_samples.jsonl
"""

from __future__ import annotations

import json
import math
import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kimi_recursive.files import git_state, read_json_object, versions, write_json, write_text
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.status import Status
from kimi_recursive.training.tracking import DEFAULT, check_trackers, start_trackers

METADATA_NAME = "experiment_metadata.json"
# How an attempt ended; a new attempt begins without them.
END_KEYS = (
    "ended_at", "error", "failed_step", "last_good_step", "last_good_checkpoint", "last_step",
)  # fmt: skip


HEADINGS = (
    "Hypothesis: what is tested?",
    "Setup: config, data, parameters",
    "Observations: what happened?",
    "Issues: which problems came up?",
    "Results: the final metrics",
    "Conclusions: what was learnt?",
)


def now() -> str:
    """The time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _stamp(time: str) -> str:
    """A time of `now` as part of a name."""
    return time[:19].replace("-", "").replace(":", "")


def environment() -> dict[str, Any]:
    """The environment of a run: versions, CUDA, git commit of the code, host."""
    import torch

    return {
        "versions": {**versions(), "cuda": torch.version.cuda},
        **git_state(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
    }


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON types: numbers as float or int; NaN and infinity as null, named under
    `non_finite`."""
    bad = sorted(k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v))
    clean = {k: None if k in bad else v for k, v in values.items() if v is not None}
    return clean | ({"non_finite": bad} if bad else {})


class ExperimentTracker:
    """Writes and extends an experiment directory.

    Outside a `with` block it adds notes, issues and metrics to a new or an existing experiment.
    A `with` block is one attempt at running the experiment. Its metadata say `running`, and at the
    end `completed`, `interrupted` (a rerun resumes it) or `failed`, with the error, the step, and
    the last good checkpoint. After an attempt that measures nothing, a completed experiment has the
    metadata that it had before: it was published again, and is not another run.

    Args:
        directory: Created when missing.
        experiment_name: The folder's name by default.
        config: Saved as `recursive_config.json`.
        training_params: Steps, batch size, learning rate, ...
        paths: Model, config and data that the run reads, by name.
        dataset: Sizes of the data, as a record of the run has them under `dataset_config`.
        tracking: Where metrics are also shown, of `tracking.TRACKERS`.

    Raises:
        ValueError: a tracker that is unknown or not installed.
    """

    def __init__(
        self,
        directory: str | Path,
        experiment_name: str | None = None,
        description: str | None = None,
        config: RecursiveConfig | None = None,
        training_params: Mapping[str, Any] | None = None,
        paths: Mapping[str, Any] | None = None,
        dataset: Mapping[str, Any] | None = None,
        tracking: Sequence[str] = DEFAULT,
    ):
        check_trackers(tracking)
        self.directory, self.tracking = Path(directory), tracking
        self._trackers: list[Any] | None = None  # those that run, from the first metrics on
        self._last_step: int | None = None
        self._completed: dict[str, Any] | None = None
        for name in ("metrics", "logs", "notes"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for name in ("issues.txt", "generation_samples.jsonl"):
            (self.directory / "notes" / name).touch()
        notes = self.directory / "notes" / "notes.txt"
        if not notes.is_file():
            lines = [f"{number}. {heading}" for number, heading in enumerate(HEADINGS, 1)]
            if description:
                lines[0] += f"\n{description}"
            write_text(notes, "\n\n".join(lines) + "\n\n")
        if self.metadata_path.is_file():
            self.metadata = read_json_object(self.metadata_path)
            if self.metadata.get("status") == Status.OK.in_experiment:
                self._completed = dict(self.metadata)
        else:
            created, name = now(), experiment_name or self.directory.resolve().name
            self.metadata = {
                "experiment_id": f"{name}_{_stamp(created)}",
                "experiment_name": name,
                "description": "",
                "created_at": created,
                "status": "created",
            }
        given = {
            "description": description or None,
            "training_params": None if training_params is None else dict(training_params),
            "paths": None if paths is None else {k: v and str(v) for k, v in paths.items()},
            "dataset": None if dataset is None else dict(dataset),
        }
        self._update(**{key: value for key, value in given.items() if value is not None})
        if config is not None:
            config.save(self.directory / CONFIG_NAME)

    @property
    def metadata_path(self) -> Path:
        return self.directory / METADATA_NAME

    def _update(self, **facts: Any) -> None:
        self.metadata |= {"updated_at": now(), **facts}
        write_json(self.metadata_path, self.metadata)

    # ---- one attempt at a run ----

    def __enter__(self) -> ExperimentTracker:
        for key in END_KEYS:
            self.metadata.pop(key, None)
        self._update(status="running", started_at=now(), **environment())
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        if error is None:
            self._finish_trackers()
            if self._completed is not None:
                self.metadata = self._completed
                self._update()
                return
            self._update(status="completed", ended_at=now())
            return
        with suppress(OSError):  # A full disk must not hide the error that reports it.
            self._finish_trackers()
        with suppress(OSError):
            self._record_end(error)

    def _finish_trackers(self) -> None:
        for tracker in self._trackers or ():
            tracker.finish()

    def _record_end(self, error: BaseException) -> None:
        if isinstance(error, SystemExit | KeyboardInterrupt):
            self._update(status="interrupted", ended_at=now(), last_step=_step_of(error))
            return
        # Here: torch, which those that only read records do without.

        from kimi_recursive.training.checkpoint import complete_checkpoints  # it imports torch

        kept = complete_checkpoints(self.directory)
        self._update(
            status="failed",
            ended_at=now(),
            error=f"{type(error).__name__}: {error}",
            failed_step=_step_of(error),
            last_good_checkpoint=str(kept[-1].relative_to(self.directory)) if kept else None,
            last_good_step=int(kept[-1].name[5:]) if kept else None,
        )

    def finish(self, results: Mapping[str, Any]) -> None:
        """Record the final results."""
        self._update(final_results=dict(results))

    def set_best(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record which checkpoint is the best so far."""
        self._update(best_checkpoint_step=step, best_metrics=finite(metrics))

    # ---- observations ----

    def add_note(self, text: str) -> None:
        """Append a line with the time to `notes/notes.txt`, below the headings."""
        self._append("notes.txt", f"[{now()}] {text}\n")

    def add_issue(self, text: str) -> None:
        """Append a line with the time to `notes/issues.txt`."""
        self._append("issues.txt", f"[{now()}] {text}\n")

    def add_generation_sample(self, step: int, prompt: str, completion: str, **facts: Any) -> None:
        """Append a JSON line to `notes/generation_samples.jsonl`."""
        sample = {"step": step, "prompt": prompt, "completion": completion, **facts}
        self._append("generation_samples.jsonl", json.dumps(sample, ensure_ascii=False) + "\n")

    def _append(self, name: str, line: str) -> None:
        with open(self.directory / "notes" / name, "a", encoding="utf-8") as file:
            file.write(line)

    def save_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write `metrics/step_<step>.json`, and the numbers to the trackers.

        Raises:
            ValueError: the metrics cannot be written (a full disk).
        """
        self._completed = None
        metrics = finite({"step": step, **metrics})
        try:
            write_json(self.directory / "metrics" / f"step_{step:06d}.json", metrics)
            self._log(step, metrics)
        except OSError as error:
            raise ValueError(
                f"{self.directory}: the metrics of step {step} cannot be written: {error}; earlier "
                "checkpoints are kept"
            ) from error

    def _log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._trackers is None:
            settings = {"name": self.metadata["experiment_name"]}
            settings |= {k: self.metadata.get(k) for k in ("training_params", "paths")}
            if (config := self.directory / CONFIG_NAME).is_file():
                settings["recursive"] = read_json_object(config)
            run = self.metadata.get("tracking_run") or self.metadata["experiment_id"]
            self._trackers = start_trackers(
                self.tracking, self.directory, run, settings, self._last_step
            )
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def rewind(self, step: int) -> None:
        """Drop metrics and samples of later steps, which a resumed run makes again. Notes
        and issues stay."""
        for path in (self.directory / "metrics").glob("step_*.json"):
            if path.stem[5:].isdigit() and int(path.stem[5:]) > step:
                path.unlink()
        samples = self.directory / "notes" / "generation_samples.jsonl"
        lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(samples, "".join(line for line in lines if not _is_later(line, step)))
        self._last_step = step

    def start_afresh(self) -> None:
        """Drop the measurements of an earlier computation here. Notes and issues stay."""
        self.rewind(-1)
        for path in (self.directory / "logs").glob("events.out.tfevents.*"):
            path.unlink()
        self._last_step = None
        again = f"_{_stamp(now())}" if "tracking_run" in self.metadata else ""
        self.metadata["tracking_run"] = self.metadata["experiment_id"] + again
        for key in ("final_results", "best_checkpoint_step", "best_metrics"):
            self.metadata.pop(key, None)
        self._update()


def _is_later(line: str, step: int) -> bool:
    """Whether a line is a sample of a later step, or was cut off by a kill."""
    try:
        sample = json.loads(line)
    except ValueError:
        return not line.endswith("\n")
    return (
        isinstance(sample, dict) and isinstance(sample.get("step"), int) and sample["step"] > step
    )


def _step_of(error: BaseException) -> int | None:
    return getattr(error, "step", None)
