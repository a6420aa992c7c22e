"""Outputs that outlive the run of a rule.

Snakemake deletes the outputs of a rule before it runs the rule. So a job keeps them under a second
name, as hard links in a folder that no rule declares, with a fingerprint of what they were made
with. A later job with the same fingerprint puts them back and computes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimi_recursive.files import file_digest, publishing, read_json_object, replacing, write_json

RECORD_NAME = "published.json"
REPUBLISHED = "was trained before with the same settings and inputs; its files are taken from"


class Published:
    """The outputs of one job: files and folders with different names.

    Args:
        folder: Where they are kept.
        outputs: Where they belong.
        fingerprint: What decides them, as JSON types.
    """

    def __init__(self, folder: Path, outputs: Sequence[Path], fingerprint: Mapping[str, Any]):
        self.folder = folder
        self.outputs = outputs
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))

    def fits(self) -> bool:
        """Whether outputs of this fingerprint are kept, whole and unchanged."""
        try:
            record = read_json_object(self.folder / RECORD_NAME)
            if record["fingerprint"] != self.fingerprint:
                return False
            digests = {name: file_digest(self.folder / name) for name in record["sha256"]}
        except (ValueError, KeyError, OSError):  # nothing is kept, or it is damaged
            return False
        return digests == record["sha256"]

    def restore(self) -> None:
        """Put the outputs that `fits` found into their places."""
        for output in self.outputs:
            kept = self.folder / output.name
            if kept.is_dir():
                with publishing(output) as folder:
                    _link_tree(kept, folder)
            else:
                with replacing(output) as path:
                    _link(kept, path)

    def keep(self) -> None:
        """Keep the outputs as they are now, in place of those of before."""
        with publishing(self.folder) as folder:
            for output in self.outputs:
                link = _link_tree if output.is_dir() else _link
                link(output, folder / output.name)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            digests = {str(path.relative_to(folder)): file_digest(path) for path in files}
            record = {"fingerprint": self.fingerprint, "sha256": digests}
            write_json(folder / RECORD_NAME, record)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)
