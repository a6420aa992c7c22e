"""The door of a room: the names that it offers, each loaded on first use.

So `import kimi_recursive`, and a rule that needs a name of `matrix`, do not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def offer(package: str, **names: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        names: For each module of the package, the names that it offers, with spaces between.
    """
    home = {name: module for module, offered in names.items() for name in offered.split()}
    sys.modules[package].__dict__["__all__"] = sorted(home)

    def get(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(home)
