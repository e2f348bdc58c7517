"""From a YAML file and a command line to dataclasses; whatever is misspelt is refused by name.

The file comes first (or after ``--config``), and every field of it, or any other, can be changed after it:

    recipes/configs/rule110_t32.yaml --n_loops 2
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sleepify.training.help import Formatter, arrange

_BESIDE = ("dataset", "chat_template")
"""Fields that may be a file's name."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping", str: "text"}


def parse_dataclasses(
    types: Sequence[Any],
    argv: Sequence[str] | None,
    description: str | None,
    many: type | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """Command line to one object of each of ``types``.

    Args:
        types: dataclasses; no two share a field.
        argv: without the program's name; None for that of the process.
        description: for ``--help``.
        many: the one of ``types`` with so many fields that ``--help`` has several headings for it.
        prog: how the program was called, for ``--help``; by default its file.

    Raises:
        ValueError: for a field, in the YAML file or on the command line, that does not exist, or a value in the file of
            another type.
    """
    parser = _parser_of(types, argv, description, many, prog)
    *parsed, _, _ = parser.parse_args_into_dataclasses(
        _arguments(argv), return_remaining_strings=True, look_for_args_file=False
    )
    return tuple(parsed)


def check_fields(types: Sequence[Any], argv: Sequence[str] | None) -> None:
    """See that all fields of a command line exist and are of their types, and make nothing of them, which may take
    devices.

    Args:
        types, argv: as in `parse_dataclasses`.

    Raises:
        ValueError: as there.
    """
    _parser_of(types, argv)


def _parser_of(
    types: Sequence[Any],
    argv: Sequence[str] | None,
    description: str | None = None,
    many: type | None = None,
    prog: str | None = None,
) -> _Parser:
    """A parser that knows the fields, with those of the YAML file as defaults."""
    arguments = _arguments(argv)
    parser = _Parser(types, prog=prog, description=description, allow_abbrev=False, formatter_class=Formatter)
    parser.add_argument("--config", help="A YAML file of fields; it may also come first, without --config.")
    known = sorted({f.name for kind in types for f in fields(kind)})
    arrange(parser, types, many)
    given, unknown = parser.parse_known_args(arguments)
    if given.config is not None:
        parser.set_defaults(**_fitted(given.config, load_config(given.config, known), types))
    if unknown:
        name = unknown[0].removeprefix("--").split("=")[0]
        raise ValueError(f"unknown on the command line: {' '.join(unknown)}{suggest(name, known)}; see --help")
    return parser


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
        ValueError: for a file that is no YAML, no mapping, has a field twice or one that is not ``known``, by name, or
            extends what cannot be.
    """
    merged: dict[str, Any] = {}
    for file in reversed(parents(Path(path))):
        values = _read(file)
        values.pop("extends", None)
        for name in values:
            if known is not None and name not in known:
                raise ValueError(f"{file}: unknown field {name!r}{suggest(str(name), known)}")
        for name in _BESIDE:
            # A file that is named by a file lies beside it.
            if isinstance(value := values.get(name), str) and (file.parent / value).is_file():
                values[name] = str(file.parent / value)
        merged = _merge(merged, values)
    return merged


def parents(path: Path) -> list[Path]:
    """A YAML file, the one that it ``extends``, the one that this extends, and so on.

    Raises:
        ValueError: for one that is not there, or extends itself.
    """
    chain = [path]
    while (parent := _read(chain[-1]).get("extends")) is not None:
        if not isinstance(parent, str) or not (chain[-1].parent / parent).is_file():
            raise ValueError(f"{chain[-1]}: expected extends to name a file beside it, got {parent!r}")
        chain.append(chain[-1].parent / parent)
        if chain[-1].resolve() in [file.resolve() for file in chain[:-1]]:
            raise ValueError(f"{path}: expected a file that does not extend itself, got {' -> '.join(map(str, chain))}")
    return chain


def _read(path: Path) -> dict[str, Any]:
    # Of the extra "train".
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got what is none: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    if twice := sorted(set(_twice(node))):
        raise ValueError(f"{path}: expected every field once, got {', '.join(twice)} twice; take one of them out")
    return values


def _twice(node: Any) -> Iterator[str]:
    """Keys that a mapping, or one in it, has more than once: YAML would take the last without a word."""
    keys = set()
    for key, value in node.value if node.id == "mapping" else [(None, value) for value in node.value]:
        if key is not None and key.id == "scalar":
            if key.value in keys:
                yield key.value
            keys.add(key.value)
        if value.id != "scalar":
            yield from _twice(value)


def _fitted(path: str, values: dict[str, Any], types: Sequence[Any]) -> dict[str, Any]:
    """A file's values as the command line would give them: null takes a setting back, a list may be one value alone.

    Raises:
        ValueError: for a value of another type, naming the field.
    """
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    fitted: dict[str, Any] = {}
    for name, value in values.items():
        kinds = set(get_args(hints[name])) if get_origin(hints[name]) in (Union, UnionType) else {hints[name]}
        if value is None:
            # Where nothing means something it is handed on; elsewhere the default is what there was before.
            fitted |= {name: None} if NoneType in kinds else {}
            continue
        kinds -= {NoneType}
        if all(isinstance(kind, type) and issubclass(kind, str) for kind in kinds):
            # Enumerations of transformers.
            kinds = {str}
        listed = [kind for kind in kinds if get_origin(kind) is list]
        if len(kinds) == 1 and listed and not isinstance(value, list):
            value = [value]
        # Text is for the parser to turn into a number. Where transformers takes several kinds, it looks itself.
        if not (isinstance(value, str) and kinds & {int, float, bool}) and (len(kinds) == 1 or kinds == {dict, str}):
            if not any(_fits(value, kind) for kind in kinds):
                wanted = " or ".join(sorted(_in_words(kind) for kind in kinds))
                raise ValueError(f"{path}: expected {name} to be {wanted}, got {value!r}")
        fitted[name] = value
    return fitted


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of YAML is one of a field's type; True for types that are not known here."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(each, get_args(kind)[0]) for each in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is bool:
        return value in (0, 1)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return not isinstance(kind, type) or kind not in _WORDS or isinstance(value, kind)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is list:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return f"{_WORDS[kind]}{', in quotes if it looks like something else' * (kind is str)}"


def suggest(name: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """What may have been meant, to end a message with; empty if nothing is as close as ``cutoff``, 1 for the same."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
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
    arguments = ["--config", *arguments] if is_file else arguments
    if sum(word.split("=")[0] == "--config" for word in arguments) > 1:
        raise ValueError("expected one YAML file, got several; have one of them extend the other")
    return arguments


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` over ``old``, mappings field by field; an architecture with its own model_type is whole as it is."""
    merged = old | new
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict) and "model_type" not in new[name]:
            merged[name] = _merge(old[name], new[name])
    return merged
