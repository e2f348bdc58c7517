"""One's own data: a name on the Hub, a folder or a file, to rows for training and held-out rows.

    data = load_text(DatasetArguments(dataset="notes.jsonl"), tokenizer, window_size=512)
    SleepTrainer(model, args, train_dataset=data.train, processing_class=tokenizer)

Rows are checked and tokenised before a model is loaded, and kept whole.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sleepify.training.settings import json_object
from sleepify.training.text_format import FORMATS, DatasetError, Encoder, recognise

logger = logging.getLogger(__name__)

READERS = {
    **{"jsonl": "json", "json": "json", "parquet": "parquet", "csv": "csv"},
    **{"txt": "text", "md": "text"},
}
GROUPED = 50
"""Batches among which a stream looks for rows of similar length."""
SAMPLED = 64
"""Rows at least, where there are as many, by which others are told from them."""
LOOKED_AT = 200
"""Rows of a stream by which its windows are told before training."""


@dataclass
class DatasetArguments:
    """The data, and how a row is written."""

    dataset: str | None = field(
        default=None, metadata={"help": f"A name on the Hub, a folder, or a file ({', '.join(READERS)})."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Which configuration of a dataset on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    dataset_split: str = field(default="train", metadata={"help": "Which split to train on."})
    dataset_format: str | None = field(
        default=None, metadata={"help": f"{', '.join(FORMATS)}; by default the one that the columns fit."}
    )
    dataset_columns: dict | str | None = field(
        default=None, metadata={"help": 'The dataset\'s names for our columns, as JSON: {"text": "body"}.'}
    )
    text_rows: str = field(
        default="document", metadata={"help": "What is a row of a text file: document (all of it), paragraph or line."}
    )
    question_first: bool = field(
        default=False, metadata={"help": "With question_answer: the question before the long text instead of after it."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "For messages: a template, or a file with one; by default the tokenizer's."}
    )
    held_out: float = field(
        default=0.05, metadata={"help": "Share of the rows (below 1) or number of them that is only tested on."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read and tokenise while training, keeping nothing; needs max_steps."}
    )

    def __post_init__(self) -> None:
        self.dataset_columns = json_object("dataset_columns", self.dataset_columns)
        if self.text_rows not in ("document", "paragraph", "line"):
            raise ValueError(f"expected text_rows to be document, paragraph or line, got {self.text_rows!r}")
        if not self.held_out >= 0 or (self.held_out >= 1 and self.held_out != int(self.held_out)):
            raise ValueError(f"expected held_out to be a share below 1 or a number of rows, got {self.held_out!r}")


class TextRows(Dataset[dict[str, list[int]]]):
    """Tokenised rows, with their lengths beside them so that similar ones can be read together."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.lengths: list[int] = list(rows["length"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row["input_ids"], "labels": row["labels"]}

    def answer(self, index: int) -> list[int]:
        """Where the answer is, [start, stop); empty if there is none."""
        return list(self.rows[index]["answer"] or [])

    def digest(self) -> str:
        """By which the very same rows are known again."""
        known = hashlib.sha256()
        for index in range(len(self)):
            known.update(repr(self[index]["input_ids"]).encode())
        return known.hexdigest()

    def sample(self) -> str:
        """By which a run knows its rows again, at little cost: all lengths, and some of the rows whole."""
        known = hashlib.sha256(repr(self.lengths).encode())
        for index in range(0, len(self), max(1, len(self) // SAMPLED)):
            known.update(repr(self[index]).encode())
        return known.hexdigest()[:16]


class TextStream(IterableDataset[dict[str, list[int]]]):
    """Rows that are tokenised as they come, over and over, sorted by length some at a time. Of several workers each
    reads files of its own; one for which there is none ends."""

    def __init__(self, rows: Any, encoder: Encoder, skip: int, batch_size: int) -> None:
        self.rows, self.encoder, self.skip, self.batch_size = rows, encoder, skip, batch_size

    def check_workers(self, n_workers: int) -> None:
        """See that each row that is held out is left out whoever reads it.

        Raises:
            ValueError: if several workers share files between them, none of which knows where the others' begin.
        """
        n_files = getattr(self.rows, "num_shards", 1)
        if self.skip and n_workers > 1 and n_files > 1:
            raise ValueError(
                f"expected dataloader_num_workers of at most 1 for a stream of {n_files} files that holds out "
                f"{self.skip} rows, got {n_workers}: each worker would leave out as many of its own; or give "
                "held_out=0 and test on a dataset of its own"
            )

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        self.check_workers(0 if worker is None else worker.num_workers)
        ends = False
        while not ends:
            ends = True
            rows = (self.encoder(row, number) for number, row in enumerate(self.rows) if number >= self.skip)
            while some := list(islice(rows, GROUPED * self.batch_size)):
                ends = False
                some.sort(key=lambda row: row["length"])
                yield from ({"input_ids": row["input_ids"], "labels": row["labels"]} for row in some)


@dataclass(frozen=True)
class TextData:
    """What to train on, and what to test on.

    Args:
        train: rows for `SleepTrainer`.
        held_out: rows that it never sees; None if none were kept.
        format: how they are written.
        windows: how many windows a row has, see `describe_windows`.
    """

    train: TextRows | TextStream
    held_out: TextRows | None
    format: str
    windows: dict[str, float]


def load_text(
    arguments: DatasetArguments,
    tokenizer: Any,
    *,
    window_size: int,
    positions: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> TextData:
    """Read, check and tokenise a dataset.

    Args:
        arguments: which, and how its rows are written.
        tokenizer: of transformers.
        window_size: L, for the report of how often a row sleeps.
        positions: the longest row that can be read; None for any length.
        batch_size: rows of a step, for streams.
        seed: of the choice of held-out rows.

    Raises:
        DatasetError: for a dataset that is not there or cannot be read, columns or values that do not fit, rows that
            are empty or too long, a chat template that does not fit.
    """
    if tokenizer is None or not hasattr(tokenizer, "encode"):
        raise DatasetError("expected a tokenizer, got none; give --tokenizer a name or a path, or 'bytes'")
    if arguments.chat_template is not None:
        given = arguments.chat_template
        is_file = "{" not in given
        if is_file and not Path(given).is_file():
            raise DatasetError(
                f"{arguments.dataset}: expected chat_template to be a template or a file with one, got {given!r}, "
                "which is neither"
            )
        tokenizer.chat_template = Path(given).read_text(encoding="utf-8") if is_file else given
    raw = read_dataset(arguments)
    renamed: Any = arguments.dataset_columns or {}
    first = next(iter(raw), None)
    if first is None:
        raise DatasetError(f"{arguments.dataset}: expected rows, got none")
    columns = list(raw.column_names or first)
    train: TextRows | TextStream
    try:
        kind = recognise(columns, renamed, arguments.dataset_format)
        encoder = Encoder(kind, tokenizer, renamed, arguments.question_first, positions)
        encoder.check()
        if arguments.streaming:
            train, held_out, lengths = _streamed(arguments, raw, encoder, batch_size)
        else:
            train, held_out, lengths = _tokenised(arguments, raw, encoder, seed)
    except DatasetError as error:
        raise DatasetError(f"{arguments.dataset}: {error}") from error
    windows = describe_windows(lengths, window_size)
    logger.warning("%s", windows_line(windows, window_size, kind))
    return TextData(train, held_out, kind, windows)


def read_dataset(arguments: DatasetArguments) -> Any:
    """The rows as they are, by the datasets library.

    Raises:
        DatasetError: if they are not there, or cannot be read.
        ImportError: without datasets, which the extra ``train`` brings.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("one's own data needs datasets: pip install 'sleepify[train]'") from error
    if arguments.dataset is None:
        raise DatasetError("expected dataset: a name on the Hub, a folder or a file; got none")
    path = Path(arguments.dataset)
    options: dict[str, Any] = {"split": arguments.dataset_split, "streaming": arguments.streaming}
    reader = READERS.get(path.suffix.removeprefix("."))
    if path.is_file():
        if reader is None:
            raise DatasetError(f"expected a file of {', '.join(READERS)}, got {path}")
        if not path.stat().st_size:
            raise DatasetError(f"{path}: expected rows, got an empty file")
        names: tuple[str, ...] = (reader,)
        # Of a part, train[:100], the split is the name.
        # To datasets a name is a pattern, which another file may fit.
        options |= {"data_files": {arguments.dataset_split.partition("[")[0]: glob.escape(str(path))}}
        options |= {"sample_by": arguments.text_rows} if reader == "text" else {}
    elif reader is not None and not path.exists() and (path.suffix != ".json" or "/" in str(path)):
        raise DatasetError(f"expected a file, found nothing at {path}")
    else:
        names = (str(path), arguments.dataset_config) if arguments.dataset_config else (str(path),)
        options |= {"revision": arguments.dataset_revision} if arguments.dataset_revision else {}
    try:
        if path.is_file() and reader == "csv":
            options |= _as_text(path)
        raw = datasets.load_dataset(*names, **options)
        # Blank lines part the others. Text files of a folder are cut into lines.
        is_cut = raw.info.builder_name == "text" and options.get("sample_by") != "document"
        return raw.filter(_says_something) if is_cut else raw
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        why = str(error.__cause__ or error).split("\n")[0]
        raise DatasetError(f"{arguments.dataset}: expected a dataset that can be read, got {why}") from error


def _says_something(row: dict[str, str]) -> bool:
    return bool(row["text"].strip())


def _as_text(path: Path) -> dict[str, Any]:
    """Options by which every value of a CSV file is read as it stands there: 42, N/A and true are text too."""
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        columns = next(csv.reader(file), [])
    text = datasets.Features({column: datasets.Value("string") for column in columns})
    return {"features": text, "keep_default_na": False}


def _tokenised(
    arguments: DatasetArguments, raw: Any, encoder: Encoder, seed: int
) -> tuple[TextRows, TextRows | None, list[int]]:
    rows = raw.map(encoder, with_indices=True, remove_columns=raw.column_names, desc="tokenise")
    lengths = list(rows["length"])
    share = arguments.held_out
    if not share:
        return TextRows(rows), None, lengths
    if len(rows) == 1:
        if share >= 1 and encoder.format == "text":
            raise DatasetError(
                f"expected held_out to be a share below 1 of a single text, whose end it is, got {share:g} rows"
            )
        return *_cut(rows, share, encoder.format), lengths
    number = int(share) if share >= 1 else max(1, round(share * len(rows)))
    if number >= len(rows):
        raise DatasetError(f"expected held_out to leave rows to train on, got {number} of {len(rows)}")
    parts = rows.train_test_split(test_size=number, seed=seed)
    return TextRows(parts["train"]), TextRows(parts["test"]), lengths


def _cut(rows: Any, share: float, kind: str) -> tuple[TextRows, TextRows]:
    """One text in two."""
    row = rows[0]
    place = len(row["input_ids"]) - max(2, round(share * len(row["input_ids"])))
    if kind != "text" or place < 2:
        raise DatasetError("expected several rows, or a text long enough to hold out its end, got one row; held_out=0")

    def part(piece: slice) -> Any:
        ids = row["input_ids"][piece]
        return rows.from_dict({"input_ids": [ids], "labels": [ids], "length": [len(ids)], "answer": [[]]})

    return TextRows(part(slice(None, place))), TextRows(part(slice(place, None)))


def _streamed(
    arguments: DatasetArguments, raw: Any, encoder: Encoder, batch_size: int
) -> tuple[TextStream, TextRows | None, list[int]]:
    import datasets

    if 0 < arguments.held_out < 1:
        raise DatasetError(
            "expected held_out to be a number of rows, since a stream does not say how many it has; give held_out=100"
        )
    kept = int(arguments.held_out)
    looked = [encoder(row, number) for number, row in enumerate(islice(raw, max(LOOKED_AT, kept + 1)))]
    if kept >= len(looked):
        raise DatasetError(f"expected held_out to leave rows to train on, got {kept} of {len(looked)}")
    held_out = TextRows(datasets.Dataset.from_list(looked[:kept])) if kept else None
    return TextStream(raw, encoder, kept, batch_size), held_out, [row["length"] for row in looked]


def describe_windows(lengths: list[int], window_size: int) -> dict[str, float]:
    """How many windows of L tokens rows have: lowest, median, mean and highest; and the share of rows that sleep."""
    windows = [length / window_size for length in lengths]
    asleep = sum(length > window_size for length in lengths)
    return {
        "rows": len(lengths),
        "min": min(windows),
        "median": statistics.median(windows),
        "mean": statistics.fmean(windows),
        "max": max(windows),
        "share_that_sleeps": asleep / len(windows),
    }


def windows_line(windows: dict[str, float], window_size: int, kind: str) -> str:
    """`describe_windows` in words, and what to do if no row fills a window."""
    line = (
        f"{windows['rows']} rows of {kind}: {windows['min']:.1f} to {windows['max']:.1f} windows "
        f"of {window_size} tokens (median {windows['median']:.1f}), "
        f"{100 * windows['share_that_sleeps']:.0f}% of them sleep"
    )
    if windows["share_that_sleeps"]:
        return line
    return f"{line}: no row fills a window, so that nothing is learnt about sleep; lower window_size, or join rows"
