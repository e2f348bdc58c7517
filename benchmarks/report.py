"""Timing in turn, ratios with their spread, and pages of tables for docs/results, written beside and renamed.

Everything that is compared runs in one process, one call each per round, in another order every round: whatever else
the machine does hits all alike, and none always follows the one that empties the caches. A figure is the median over
rounds, with quartiles; a ratio is taken within every round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

import torch
import transformers

import sleepify

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def machine() -> str:
    """One line: processor or GPU, threads, versions, date."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        device = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return (
        f"{device}; Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, sleepify {sleepify.__version__}; {datetime.date.today().isoformat()}"
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def text(self, scale: float = 1.0, digits: int = 2) -> str:
        """For a table: "1.02 (1.01-1.04)"."""
        low, middle, high = (f"{value * scale:,.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{middle} ({low}-{high})"


def alternate(
    actions: Mapping[Any, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: str = "cpu",
    seconds: float | None = None,
) -> dict[Any, list[float]]:
    """Seconds of every action in every round.

    On a CPU these are seconds of processor time of this process, which another program's share of the machine does not
    lengthen; on a GPU seconds between two synchronisations.

    Args:
        actions: what to time, by key.
        repeats: timed rounds.
        warmup: rounds before them.
        device: where the work happens.
        seconds: begin no further round after so long, once there are three.
    """
    keys = list(actions)
    times: dict[Any, list[float]] = {key: [] for key in keys}
    begin = time.perf_counter()
    for turn in range(warmup + repeats):
        if seconds is not None and turn >= warmup + 3 and time.perf_counter() - begin > seconds:
            break
        for key in Random(turn).sample(keys, len(keys)):
            elapsed = stopwatch(actions[key], device)
            if turn >= warmup:
                times[key].append(elapsed)
    return times


def stopwatch(action: Callable[[], object], device: str) -> float:
    """Seconds of one call, as in `alternate`."""
    if device == "cpu":
        begin = time.process_time()
        action()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def ratio(times: Mapping[Any, list[float]], above: Hashable, below: Hashable, over: float = 1.0) -> Spread:
    """Of two actions, within every round; divided by ``over``."""
    return Spread.of([a / b / over for a, b in zip(times[above], times[below], strict=True)])


# --- pages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """What the project says of a figure: ``at_most`` or ``at_least``."""

    what: str
    value: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        above = self.at_most is None or self.value <= self.at_most
        return above and (self.at_least is None or self.value >= self.at_least)

    def row(self) -> list[str]:
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return [self.what, bound, f"{self.value:.3f}", "yes" if self.holds else "**no**"]


@dataclass
class Part:
    """A part of a page: a table, how to read it, the claims it is held to, and its figures as numbers."""

    title: str
    intro: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def write_page(path: Path, *, title: str, command: str, intro: str, parts: Sequence[Part]) -> None:
    """Write parts as one Markdown page that names the machine and the command that made it."""
    lines = [f"# {title}", "", f"Made by `{command}`. {machine()}. {intro}", ""]
    claims = [claim for part in parts for claim in part.claims]
    if claims:
        lines += _table(["held to", "bound", "measured (median)", "holds"], [claim.row() for claim in claims])
    for part in parts:
        lines += [f"## {part.title}", "", part.intro, "", *_table(part.head, part.rows)]
    _replace(path, "\n".join(lines).rstrip() + "\n")


def write_json(path: Path, parts: Sequence[Part]) -> None:
    """The same as numbers."""
    content: dict[str, Any] = {"machine": machine()}
    for part in parts:
        claims = [{**vars(claim), "holds": claim.holds} for claim in part.claims]
        content[part.title] = {"figures": part.figures, "claims": claims}
    _replace(path, json.dumps(content, indent=2, default=vars) + "\n")


def page_arguments(
    argv: Sequence[str] | None, description: str | None, name: str, *, repeats: int | None, unit: str = "rounds"
) -> argparse.Namespace:
    """The command line of a benchmark that writes ``docs/results/<name>.md``, and one thread for all that follows.

    Args:
        argv: words of the command line; None for those of the process.
        description: the benchmark's docstring.
        name: of the page, and of the module.
        repeats: how often is measured by default; None if there is nothing to repeat.
        unit: what is repeated.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help=unit)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.md", help="where the page goes")
    parser.add_argument("--tiny", action="store_true", help="to try the script; its figures mean nothing")
    parser.set_defaults(command=f"python -m benchmarks.{name}")
    torch.set_num_threads(1)
    return parser.parse_args(argv)


def publish(arguments: argparse.Namespace, title: str, intro: str, parts: list[Part]) -> list[Part]:
    """Write the page where `page_arguments` were told, print it, and hand its parts back."""
    write_page(arguments.output, title=title, command=arguments.command, intro=intro, parts=parts)
    print(arguments.output.read_text(encoding="utf-8"))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
