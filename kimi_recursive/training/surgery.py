"""Surgery: put untrained refinement cells around a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_recursive.files import publishing
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.loading import build_wrapper, load_base
from kimi_recursive.model.sidecar import save_sidecar


def insert_cells(
    base_dir: Path,
    recursive: Mapping[str, Any],
    seed: int,
    output_dir: Path,
    **load_options: Any,
) -> None:
    """Write a fresh sidecar for a base; its numbers depend on `seed` alone.

    Args:
        recursive: Parameters of `RecursiveConfig`; recursion is enabled.
        load_options: Passed on to `load_base`.

    Raises:
        ValueError: invalid parameters, layers that the base does not have, a base that does not
            load.
    """
    config = RecursiveConfig.from_dict({**recursive, "recursive_enabled": True}, "recursive")
    wrapper = build_wrapper(load_base(base_dir, **load_options), config, seed)
    with publishing(output_dir) as folder:
        save_sidecar(wrapper, folder, base_dir)
