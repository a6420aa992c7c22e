"""Digests of models, for the fingerprints of what is made from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kimi_recursive.files import file_digest
from kimi_recursive.layout import SIDECAR_NAME


def model_digest(directory: str | Path, revision: str | None = None) -> str:
    """Digest of a model directory's config and weights: name, size, and up to 64 MiB of each file,
    from its start and its end. For a Hub id, the id with its revision."""
    if not Path(directory).is_dir():
        return f"{directory}@{revision}"
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            size, part = path.stat().st_size, 32 << 20
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(part))
                file.seek(max(part, size - part))
                digest.update(file.read())
    return digest.hexdigest()


def sidecar_digests(directory: str | Path) -> dict[str, str]:
    """sha256 of the files of a sidecar directory, by relative path; empty for a base."""
    folder = Path(directory)
    if not (folder / SIDECAR_NAME).is_file():
        return {}
    files = sorted(path for path in folder.rglob("*.*") if path.suffix in (".safetensors", ".json"))
    return {str(path.relative_to(folder)): file_digest(path) for path in files}
