"""Bases in few bits. Their libraries are in a folder of their own: see `make test`."""

from saved import tokens_dir  # noqa: F401
