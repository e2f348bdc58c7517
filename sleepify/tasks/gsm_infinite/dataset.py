"""Published problems in, rows of tokens out to disk and back.

Needs ``datasets`` (and its pyarrow) for the Hub, Parquet and Arrow; JSONL needs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sleepify.tasks.base import Example, Query
from sleepify.tasks.gsm_infinite.problem import PUBLISHED_MODES, Problem

_FIELDS = ("problem", "question", "solution", "op", "template", "mode")
_MESSAGE = re.compile(r"Problem: (?P<problem>.+) Question: (?P<question>.+?)\s*Solution:\s*", re.DOTALL)
_ANSWER = re.compile(r"Answer: (-?\d+)\.?\s*$")
_BATCH = 256


def read_rows(source: str | Path, split: str | None = None) -> Iterator[Mapping[str, Any]]:
    """Rows of published problems.

    Args:
        source: a local ``.jsonl`` or ``.parquet`` file, or a name on the Hub such as
            ``InfiniAILab/gsm_infinite_medium_0``.
        split: of a Hub dataset (``"ops_2"`` ...); all of them by default. A local file has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object (with its number), or no rows.
        ImportError: ``datasets`` is needed and not installed.
    """
    path = Path(source)
    empty = True
    local = path.suffix in (".jsonl", ".parquet")
    if local and not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of problems; a name on the Hub has no such ending")
    if local and split is not None:
        raise ValueError(f"{path}: a local file has no splits, got split={split!r}")
    for row in _jsonl(path) if path.suffix == ".jsonl" else _from_datasets(path if local else str(source), split):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{source}: expected problems, got an empty split")


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:60]!r}")
            yield row


def _from_datasets(source: str | Path, split: str | None) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"reading {source} needs the package datasets: pip install 'sleepify[train]'") from error
    if isinstance(source, Path):
        yield from datasets.Dataset.from_parquet(str(source))
        return
    loaded = datasets.load_dataset(source, split=split)
    for part in loaded.values() if isinstance(loaded, Mapping) else [loaded]:
        yield from part


def load_problems(
    source: str | Path, split: str | None = None, invalid: Literal["raise", "drop"] = "raise"
) -> list[Problem]:
    """Published problems, each solved from its text (the published reverse problems hold up to 2% that do not solve).

    Args:
        source: as :func:`read_rows`.
        split: as :func:`read_rows`.
        invalid: what to do about a problem whose text does not give its answer; a missing field always raises.

    Raises:
        ValueError: a row (by number) that lacks fields or does not solve, or nothing left.
    """
    if invalid not in ("raise", "drop"):
        raise ValueError(f"expected invalid='raise' or 'drop', got {invalid!r}")
    problems = []
    for number, row in enumerate(read_rows(source, split), start=1):
        problem = _problem(row, f"{source}, row {number}")
        try:
            problem.check()
        except ValueError as error:
            if invalid == "drop":
                continue
            raise ValueError(f"{source}, row {number}: {error}; pass invalid='drop' to leave such rows out") from error
        problems.append(problem)
    if not problems:
        raise ValueError(f"{source}: no row solves to its answer")
    return problems


def published_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """``problem`` and ``question`` of a published row, from its chat messages where it holds them only there."""
    text = {name: row.get(name) for name in ("problem", "question")}
    if all(text.values()):
        return text
    for message in reversed(row.get("messages") or []):
        if found := _MESSAGE.search(str(message.get("content", ""))):
            return found.groupdict()
    return text


def _problem(row: Mapping[str, Any], where: str) -> Problem:
    fields = {**row, **published_text(row)}
    missing = [name for name in _FIELDS if fields.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{where}: lacks {missing}; expected {list(_FIELDS)}, got {sorted(row)}")
    answer = _ANSWER.search(fields["solution"])
    if answer is None:
        raise ValueError(
            f"{where}: expected a solution ending in 'Answer: <integer>.', got {fields['solution'][-40:]!r}"
        )
    if fields["mode"] not in PUBLISHED_MODES:
        raise ValueError(f"{where}: expected a mode among {sorted(PUBLISHED_MODES)}, got {fields['mode']!r}")
    return Problem(
        problem=fields["problem"].strip(),
        question=fields["question"],
        solution=fields["solution"],
        answer=int(answer[1]),
        operations=int(fields["op"]),
        theme=fields["template"],
        mode=PUBLISHED_MODES[fields["mode"]],
    )


def write_examples(examples: Iterable[Example], path: str | Path, max_tokens: int | None = None) -> int:
    """Stream rows to an Arrow file, a few hundred in memory at a time.

    Args:
        examples: rows, e.g. ``(task.example(i) for i in range(10_000))``.
        path: of the file, which :class:`CachedExamples` and ``datasets.Dataset.from_file`` read.
        max_tokens: longest row allowed.

    Returns:
        How many rows were written.

    Raises:
        ValueError: no rows, or one longer than allowed.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    query = pa.struct([(name, pa.int32()) for name in ("difficulty", "start", "stop")])
    schema = pa.schema([("input_ids", ids), ("labels", ids), ("queries", pa.list_(query))])
    path = Path(path)
    # Under another name until it is whole, so that a run that was stopped leaves no short file to be trained on.
    partial = path.with_name(path.name + ".partial")
    try:
        total = _write(examples, partial, schema, max_tokens)
        if total == 0:
            raise ValueError(f"{path}: expected rows to write, got an empty split")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return total


def _write(examples: Iterable[Example], path: Path, schema: Any, max_tokens: int | None) -> int:
    import pyarrow as pa

    total, batch = 0, []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for example in examples:
            if max_tokens is not None and len(example.input_ids) > max_tokens:
                raise ValueError(f"row {total}: expected at most {max_tokens} tokens, got {len(example.input_ids)}")
            queries = [{"difficulty": q.difficulty, "start": q.start, "stop": q.stop} for q in example.queries]
            batch.append({"input_ids": example.input_ids, "labels": example.labels, "queries": queries})
            total += 1
            if len(batch) == _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return total


class CachedExamples:
    """Rows of an Arrow file, memory-mapped.

    Args:
        path: written by :func:`write_examples`.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: expected an Arrow file; write one with write_examples")
        import datasets

        self.rows = datasets.Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return Example(row["input_ids"], row["labels"], [Query(**query) for query in row["queries"]])
