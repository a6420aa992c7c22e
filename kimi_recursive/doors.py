"""The door of a room: the names that it offers, each loaded on first use.

So `import kimi_recursive`, and a rule that needs a name of `matrix`, do not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
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


class _Follow(MetaPathFinder):
    """Imports `ours` right after `other`, once."""

    def __init__(self, other: str, ours: str):
        self.other, self.ours = other, ours

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.other:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                import_module(self.ours)

            spec.loader.exec_module = exec_module  # the loader belongs to this one import
        return spec


def follow(other: str, ours: str) -> None:
    """Import our module `ours` as soon as `other` is there: now, or right after someone imports it.

    So we register with a library of others without importing it for those who do not use it.
    """
    if other in sys.modules:
        import_module(ours)
    else:
        sys.meta_path.insert(0, _Follow(other, ours))


@contextmanager
def missing_extra(extra: str, what: str) -> Iterator[None]:
    """Say which extra to install when an import inside fails.

    Args:
        extra: The extra of this package that brings the import.
        what: What needs it, as the subject of the message.

    Raises:
        ValueError: a package is missing, or is of a version that does not fit.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("kimi_recursive"):
            raise
        raise ValueError(f"{what} needs pip install 'kimi-recursive[{extra}]' ({error})") from error
