"""From a YAML file and a command line to dataclasses; whatever is misspelt is refused by name.

The file comes first (or after ``--config``), and every field of it, or any other, can be changed after it:

    recipes/configs/rule110_t32.yaml --n_loops 2
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sleepify.training.help import Formatter, arrange

_BESIDE = ("dataset", "chat_template")
"""Fields that may be a file's name."""


def parse_dataclasses(
    types: Sequence[Any], argv: Sequence[str] | None, description: str | None, many: type | None = None
) -> tuple[Any, ...]:
    """Command line to one object of each of ``types``.

    Args:
        types: dataclasses; no two share a field.
        argv: without the program's name; None for that of the process.
        description: for ``--help``.
        many: the one of ``types`` with so many fields that ``--help`` has several headings for it.

    Raises:
        ValueError: for a field, in the YAML file or on the command line, that does not exist.
    """
    arguments = _arguments(argv)
    parser = _Parser(types, description=description, allow_abbrev=False, formatter_class=Formatter)
    parser.add_argument("--config", help="A YAML file of fields; it may also come first, without --config.")
    known = sorted({f.name for kind in types for f in fields(kind)})
    arrange(parser, types, many)
    given, _ = parser.parse_known_args(arguments)
    if given.config is not None:
        parser.set_defaults(**load_config(given.config, known))
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown on the command line: {' '.join(unknown)}{suggest(name, known)}; see --help")
    return tuple(parsed)


def peek(name: str, argv: Sequence[str] | None) -> tuple[Any, str]:
    """One field's value, before it is known which others there are; None if nobody gives it. And who gave it, in words.

    Args:
        name: of the field.
        argv: as in `parse_dataclasses`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{name}", dest="value")
    given, _ = parser.parse_known_args(_arguments(argv))
    if given.value is not None:
        return given.value, "the command line"
    return (None if given.config is None else load_config(given.config).get(name)), str(given.config)


def load_config(path: str | Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The fields in a YAML file, after those of the file that it ``extends`` (a path relative to its own, as are data).

    Args:
        path: of the file.
        known: the fields that there are; None for any.

    Raises:
        ValueError: for a file that is no mapping, or a field that is not ``known``, by name.
    """
    # Of the extra "train".
    import yaml

    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    for name in _BESIDE:
        # A file that is named by a file lies beside it.
        if isinstance(value := values.get(name), str) and (path.parent / value).is_file():
            values[name] = str(path.parent / value)
    parent = values.pop("extends", None)
    for name in values:
        if known is not None and name not in known:
            raise ValueError(f"{path}: unknown field {name!r}{suggest(str(name), known)}")
    return values if parent is None else _merge(load_config(path.parent / parent, known), values)


def parents(path: Path) -> list[Path]:
    """A YAML file, the one that it ``extends``, the one that this extends, and so on."""
    # Of the extra "train".
    import yaml

    parent = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("extends")
    return [path, *([] if parent is None else parents(path.parent / parent))]


def suggest(name: str, known: Collection[str]) -> str:
    """What may have been meant, to end a message with; empty if nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def json_object(name: str, value: dict | str | None) -> dict[str, Any] | None:
    """The value of a field that a file gives as a mapping and a command line as JSON.

    Raises:
        ValueError: for text that is no JSON object, naming the field.
    """
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object, got {value!r} ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name}: expected a JSON object, got {value!r}")
    return parsed


class _Parser(HfArgumentParser):
    """transformers' parser, which takes every field that may be a bool for nothing else, and loses words like "all";
    and wants a word after fields that are bools or left open."""

    def add_argument(self, *names: Any, **options: Any) -> Any:
        if options.get("nargs") == "?" and isinstance(options.get("default"), str):
            options["type"] = str
        if options.get("type") is string_to_bool:
            options = {"nargs": "?", "const": True} | options
        return super().add_argument(*names, **options)


def _arguments(argv: Sequence[str] | None) -> list[str]:
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_file = bool(arguments) and arguments[0].endswith((".yaml", ".yml"))
    return ["--config", *arguments] if is_file else arguments


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, mappings field by field; an architecture with its own model_type is whole as it is."""
    merged = old | new
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict) and "model_type" not in new[name]:
            merged[name] = _merge(old[name], new[name])
    return merged
