"""Check a mapping against a JSON Schema; each error is one line that names the key."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from kimi_recursive.text import unknown_key_message


@functools.cache
def _validator() -> Any:
    # Imported late: the command line starts without jsonschema.
    from jsonschema import Draft202012Validator, validators

    # JSON Schema accepts 16.0 as an integer; Python's range does not.
    integer = Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _checker, value: type(value) is int
    )
    return validators.extend(Draft202012Validator, type_checker=integer)


def schema_errors(value: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """One line for each thing that a JSON Schema does not allow."""
    found = sorted(_validator()(schema).iter_errors(value), key=_where)
    return [line for error in found for line in _explain(error)]


def _where(error: Any) -> str:
    return ".".join(str(part) for part in error.absolute_path)


def _other_types(schema: Mapping[str, Any]) -> str:
    """The types allowed beside a text."""
    names = {"array": "list", "object": "mapping"}
    return " or ".join(str(names.get(kind, kind)) for kind in schema["type"] if kind != "string")


def _explain(error: Any) -> Iterator[str]:
    where, value, want = _where(error) or "config", error.instance, error.validator_value
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        for key in sorted(set(value) - set(allowed)):
            yield unknown_key_message(key, allowed, where)
    elif error.validator == "required":
        for key in sorted(set(want) - set(value)):
            yield f"{where}: key '{key}' is missing"
    else:
        phrases = {
            "type": lambda: "of type " + (want if isinstance(want, str) else " or ".join(want)),
            "enum": lambda: "one of " + ", ".join(map(str, want)),
            "minimum": lambda: f"at least {want}",
            "maximum": lambda: f"at most {want}",
            "exclusiveMinimum": lambda: f"above {want}",
            "exclusiveMaximum": lambda: f"below {want}",
            "minItems": lambda: f"a list of at least {want}",
            "minLength": lambda: "a non-empty text",
            "pattern": lambda: f"a text that matches {want}, or a {_other_types(error.schema)}",
            "uniqueItems": lambda: "a list without repetition",
        }
        phrase = phrases.get(error.validator)
        allowed = phrase() if phrase else f"valid ({error.message})"
        yield f"{where}: must be {allowed}, got {value!r}"
