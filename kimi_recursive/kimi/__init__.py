"""Kimi Delta Attention on the CPU."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    kda="chunk_kda",
    switch="install_fast_kda uninstall_fast_kda",
    short_passes="ShortPasses",
)
