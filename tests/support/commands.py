"""How tests call the command line, and what a user error looks like."""

import sys
from pathlib import Path

import pytest

from kimi_recursive import cli


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["kimi-recursive", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


def error_of(function, *arguments, **more) -> str:
    """The message of the ValueError, which has to be one line."""
    with pytest.raises(ValueError) as caught:
        function(*arguments, **more)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)
