"""The config of a sidecar for transformers' Auto classes.

`kimi_recursive/__init__.py` has this module imported right after the registry of those classes, so
it stays light: the classes that a config leads to are loaded when the first config is read.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class KimiRecursiveConfig(PreTrainedConfig):
    """Says that a folder or a Hub id is a sidecar. All that loading needs is in its other files; a
    loaded model also shows the sizes and special tokens of its base here."""

    model_type = "kimi_recursive"

    def __init__(self, **values: Any):
        super().__init__(**values)
        import_module("kimi_recursive.model.native")


AutoConfig.register(KimiRecursiveConfig.model_type, KimiRecursiveConfig)
