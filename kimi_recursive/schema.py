"""Check a mapping against a JSON Schema; each error is one line that names the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError

from kimi_recursive.text import unknown_key_message

# JSON Schema accepts 16.0 as an integer; Python's range does not.
_Validator = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _checker, value: type(value) is int
    ),
)


def schema_errors(value: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """One line for each thing that a JSON Schema does not allow."""
    found = sorted(_Validator(schema).iter_errors(value), key=_where)
    return [line for error in found for line in _explain(error)]


def _where(error: ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path)


def _other_types(kinds: list[str]) -> str:
    """The types allowed beside a text."""
    names = {"array": "list", "object": "mapping"}
    return " or ".join(names.get(kind, kind) for kind in kinds if kind != "string")


def _explain(error: ValidationError) -> Iterator[str]:
    where, value = _where(error) or "config", error.instance
    want, schema = cast("Any", error.validator_value), cast("Any", error.schema)
    if error.validator == "additionalProperties":
        allowed = schema.get("properties", {})
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
            "pattern": lambda: f"a text that matches {want}, or a {_other_types(schema['type'])}",
            "uniqueItems": lambda: "a list without repetition",
        }
        phrase = phrases.get(str(error.validator))
        allowed = phrase() if phrase else f"valid ({error.message})"
        yield f"{where}: must be {allowed}, got {value!r}"
