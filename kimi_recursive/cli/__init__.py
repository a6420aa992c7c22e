"""The command `kimi-recursive`: a file a command."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    app="main",
)
