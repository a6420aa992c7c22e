"""Check a mapping against a JSON Schema; each error is one line that names the key."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from kimi_recursive.text import WIDTH, cut, shown, unknown_key_message

MAX_KEYS = 5  # that a message lists of those that a section lacks


def schema_of(package: str, name: str) -> dict[str, Any]:
    """A JSON Schema that lies in `schemas/` of a package as YAML."""
    import yaml

    text = files(package).joinpath("schemas", name).read_text("utf-8")
    # libyaml, where PyYAML was built with it, is ten times as fast.
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


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
    """One line for each thing that a JSON Schema does not allow. All keys that a section lacks are
    in its last line, since a section that is something else altogether lacks most of them."""
    lines: dict[str, dict[str, None]] = {}
    missing: dict[str, dict[str, None]] = {}
    for error in sorted(_validator()(schema).iter_errors(value), key=_where):
        where = _where(error) or "config"
        section, _, inner = where.partition(".")
        lines.setdefault(section, {})
        if error.validator == "required":
            keys = sorted(set(error.validator_value) - set(error.instance))
            keys = [f"{inner}.{key}" if inner else key for key in keys]
            missing.setdefault(section, {}).update(dict.fromkeys(keys))
        else:
            lines[section].update(dict.fromkeys(_explain(error, where)))
    found = []
    for section in lines:
        found += lines[section]
        if keys := list(missing.get(section, ())):
            more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
            lacks = f"lacks {', '.join(keys[:MAX_KEYS])}{more}"
            if lines[section]:
                found[-1] += f" ({section} {lacks})"
            else:
                found.append(f"{section}: {lacks}")
    return found


def _where(error: Any) -> str:
    return cut(".".join(str(part) for part in error.absolute_path), WIDTH)


def _other_types(schema: Mapping[str, Any]) -> str:
    """The types allowed beside a text."""
    names = {"array": "list", "object": "mapping"}
    return " or ".join(str(names.get(kind, kind)) for kind in schema["type"] if kind != "string")


def _explain(error: Any, where: str) -> Iterator[str]:
    value, want = error.instance, error.validator_value
    if error.validator == "additionalProperties":
        allowed = error.schema.get("properties", {})
        for key in sorted(set(value) - set(allowed)):
            yield unknown_key_message(key, allowed, where)
        return
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
    allowed = phrase() if phrase else f"valid ({cut(error.message, WIDTH)})"
    yield f"{where}: must be {allowed}, got {shown(value)}"
