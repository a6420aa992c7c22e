"""What became of a run: one vocabulary, and the words that files and guides have for it."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The state of a run, or of an artefact.

    Attributes:
        OK: Complete, and made from the present config.
        RUNNING: In progress.
        INTERRUPTED: Stopped before its last step; the next attempt resumes it.
        UNSCORED: A log exists, but holds no evaluation.
        FAILED: The last attempt ended in an error.
        DAMAGED: A file exists, but cannot be read.
        MISSING: Nothing exists, or only what another config made.
    """

    OK = "ok"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    UNSCORED = "unscored"
    FAILED = "failed"
    DAMAGED = "damaged"
    MISSING = "missing"

    @property
    def in_experiment(self) -> str:
        """The word in `experiment_metadata.json` and in the logs of records."""
        return {Status.OK: "completed"}.get(self, self.value)

    @property
    def in_track_b(self) -> str:
        """The word in Track-B's summaries."""
        return _TRACK_B.get(self, self.value)


_TRACK_B = {
    Status.OK: "success",
    Status.INTERRUPTED: "incomplete",
    Status.UNSCORED: "no_eval",
    Status.DAMAGED: "parse_error",
    Status.MISSING: "missing_logs",
}
