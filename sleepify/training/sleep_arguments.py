"""The settings of sleep as fields of a command line: derived from `SleepConfig` and `FastWeightConfig`.

A field that is added to one of those two can be set by every recipe, with the type of its annotation and the help of
its docstring; those of inserted layers with the prefix ``fast_weights_``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from sleepify.config import FastWeightConfig, SleepConfig
from sleepify.retrofit import KEYWORDS
from sleepify.settings import Settings

INSERTED = "fast_weights"
PREFIX = f"{INSERTED}_"
# Keywords of `sleepify` that recipes have in another form: single fields of the layers, and ``model_revision``.
ELSEWHERE = frozenset({INSERTED, "base_model_revision"})
T_ = TypeVar("T_")


def documented(kind: type) -> dict[str, str]:
    """What the "Args" of a class's docstring say of each field, each on one line."""
    _, _, section = inspect.cleandoc(kind.__doc__ or "").partition("\nArgs:\n")
    section = section.split("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?=    \S)", section):
        names, _, text = entry.strip().partition(": ")
        # For argparse a percent sign begins a placeholder.
        found.update(dict.fromkeys(names.split(", "), " ".join(text.split()).replace("%", "%%")))
    return found


def argument_type(annotation: Any) -> Any:
    """What a command line takes for a field: one value, or whole numbers."""
    is_union = get_origin(annotation) in (Union, UnionType)
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if is_union else [annotation]
    # transformers checks values by annotation, so that one for lists and tuples alike says Any.
    is_list = any(kind is Any or get_origin(kind) in (list, tuple) for kind in kinds)
    return list[int] if is_list else kinds[0]


def _derived() -> Iterator[tuple[str, Any, str]]:
    """(name, type, help) of every field."""
    help_texts = documented(SleepConfig)
    annotations = [inspect.get_annotations(kind, eval_str=True) for kind in (Settings, SleepConfig)]
    for name, annotation in (annotations[0] | annotations[1]).items():
        if name in KEYWORDS - ELSEWHERE:
            yield name, argument_type(annotation), help_texts.get(name, "")
    help_texts = documented(FastWeightConfig)
    for name, annotation in inspect.get_annotations(FastWeightConfig, eval_str=True).items():
        yield PREFIX + name, argument_type(annotation), f"Of inserted layers: {help_texts.get(name, '')}"


def with_settings(kind: type[T_]) -> type[T_]:
    """The dataclass with a field for every setting, None where nothing is asked for."""
    added = [
        (name, value_type | None, field(default=None, metadata={"help": text})) for name, value_type, text in _derived()
    ]
    whole = make_dataclass(kind.__name__, added, bases=(kind,), namespace={"__doc__": kind.__doc__})
    whole.__module__ = kind.__module__
    return whole


@with_settings
@dataclass
class SleepArguments:
    """How it sleeps; what is left out is sleepify's default, or what the checkpoint says."""

    sleep: bool = field(
        default=True, metadata={"help": "False: the base as it is, for baselines; N, L and the like are then not used."}
    )

    def __post_init__(self) -> None:
        # What no base could have is said before one is read.
        SleepConfig(**self.settings())

    def settings(self) -> dict[str, Any]:
        """What was given, as keywords of `sleepify`.

        Raises:
            ValueError: for inserted layers that cannot be.
        """
        values = {name: getattr(self, name) for name, _, _ in _derived()}
        given = {name: value for name, value in values.items() if value is not None}
        inserted = {name.removeprefix(PREFIX): given.pop(name) for name in list(given) if name.startswith(PREFIX)}
        return given | ({INSERTED: FastWeightConfig(**inserted)} if inserted else {})
