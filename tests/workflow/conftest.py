"""The whole matrix at a tiny size, made once."""

from tiny_matrix import copy, project  # noqa: F401
