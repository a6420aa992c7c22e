"""Kimi Recursive: give a pretrained decoder a recursive refinement loop and measure what it does.

Names load on first use, so that `import kimi_recursive` (and `kimi-recursive --help`) does not
wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "RecursiveConfig": "config",
    "get_baseline_config": "config",
    "get_after_surgery_config": "config",
    "get_phase_a_config": "config",
    "get_phase_b_config": "config",
    "get_phase_c_config": "config",
    "RefineCell": "refine",
    "LatentToken": "refine",
    "BoundaryHead": "refine",
    "ChunkRefineWrapper": "model",
    "generate_chunks": "generate",
    "load_model_with_config": "loader",
    "ExperimentTracker": "experiment",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
