"""Trainings that are killed again and again."""

from saved import tokens_dir  # noqa: F401
