"""From a task or tokenised rows to batches.

Padding makes no windows: the model reads each row as if it were alone, whichever side it is padded on. What a collator
can get wrong is the labels, so this one checks and clears them where no prediction is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from sleepify.tasks.base import IGNORE, Example, Split

# `len()` of a dataset without end: more rows than any run reads, and a number that samplers can still count to.
ENDLESS = 2**40


class Task(Protocol):
    """What is asked of a task: examples that depend on their index and split alone."""

    def example(self, index: int, split: Split = "train") -> Example:
        """The row number ``index`` of ``split``."""


class TaskDataset(Dataset[dict[str, list[int]]]):
    """Rows of a task. Row i is a pure function of the task, the split and i, so a run that resumes sees the same rows.

    Args:
        task: `sleepify.tasks`.
        split: "train" or "test".
        n_examples: how many rows there are; None for no end.
        start: index of the first.
    """

    def __init__(self, task: Task, split: Split = "train", n_examples: int | None = None, start: int = 0) -> None:
        if n_examples is not None and n_examples < 1:
            raise ValueError(f"expected n_examples of at least 1, or None for no end, got {n_examples}")
        if start < 0:
            raise ValueError(f"expected start to be 0 or more, got {start}")
        self.task, self.split, self.start = task, split, start
        self.n_examples = ENDLESS if n_examples is None else n_examples

    def __len__(self) -> int:
        return self.n_examples

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.n_examples:
            raise IndexError(f"expected an index from 0 to {self.n_examples - 1}, got {index}")
        example = self.task.example(self.start + index, self.split)
        return {"input_ids": example.input_ids, "labels": example.labels}


class SeededByLength(LengthGroupedSampler):
    """transformers' sampler, whose order follows from seed and epoch alone, so that a run that resumes within an epoch
    reads the rows that are left of it.

    Args:
        dataset: whose rows they are. Their lengths are its column ``length_column_name`` or its attribute ``lengths``,
            else those of ``input_ids``.
        args: of the run.
        epoch: how many have gone by, or a part of one; None for none.

    Raises:
        ValueError: for rows that have no length.
    """

    def __init__(self, dataset: Any, args: TrainingArguments, epoch: Callable[[], float | None]) -> None:
        rows = args.train_batch_size * args.gradient_accumulation_steps
        columns = getattr(dataset, "column_names", None) or ()
        named = args.length_column_name in columns
        lengths = dataset[args.length_column_name] if named else getattr(dataset, "lengths", None)
        super().__init__(rows, dataset=dataset, lengths=None if lengths is None else list(lengths))
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        drawn = torch.Generator().manual_seed(Random(f"{self.seed}/{int(self.epoch() or 0)}").getrandbits(63))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=drawn))


class SleepCollator:
    """Rows of different length into a batch: ``input_ids``, ``attention_mask`` and ``labels``, each [B, T].

    Labels are aligned with ``input_ids`` (the model shifts them) and -100 where nothing is predicted. The label of a
    row's first token is cleared: nothing comes before it that could predict it, and under left padding it would be
    counted all the same. Of a row with an ``attention_mask`` of its own only what it marks is read: padding that came
    with the row is no text.

    Args:
        pad_id: the token to pad with.
        padding_side: "left" or "right"; the model gives the same for both.
        window_size: L; with ``pad_to_windows``.
        pad_to_windows: pad to at least so many windows of columns, so that batches have one shape.

    Raises:
        ValueError: for rows without tokens, or labels or a mask of another length than their tokens.
    """

    def __init__(
        self,
        pad_id: int,
        padding_side: str = "left",
        window_size: int | None = None,
        pad_to_windows: int | None = None,
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"expected padding_side 'left' or 'right', got {padding_side!r}")
        if pad_to_windows is not None and window_size is None:
            raise ValueError("expected window_size with pad_to_windows, got None")
        self.pad_id, self.padding_side = pad_id, padding_side
        self.min_width = (window_size or 0) * (pad_to_windows or 0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows with ``input_ids`` and, for training, ``labels``; ``attention_mask`` where they are padded."""
        rows = [_unpadded(row) for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        if not rows or min(lengths) == 0:
            raise ValueError(f"expected rows of at least one token, got rows of {lengths}")
        width = max(self.min_width, *lengths)
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": self._pad([[1] * length for length in lengths], width, 0),
        }
        if "labels" in rows[0]:
            for row, length in zip(rows, lengths, strict=True):
                if len(row["labels"]) != length:
                    raise ValueError(f"expected one label per token ({length}), got {len(row['labels'])}")
            batch["labels"] = self._pad([[IGNORE, *list(row["labels"])[1:]] for row in rows], width, IGNORE)
        return batch

    def _pad(self, rows: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
        padded = torch.full((len(rows), width), fill, dtype=torch.long)
        for row, values in enumerate(rows):
            first = width - len(values) if self.padding_side == "left" else 0
            padded[row, first : first + len(values)] = torch.as_tensor(values, dtype=torch.long)
        return padded


def _unpadded(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row without the tokens that its own mask leaves out.

    Raises:
        ValueError: if there is not one mask value and one label per token.
    """
    mask = row.get("attention_mask")
    if mask is None:
        return row
    kept = {name: row[name] for name in ("input_ids", "labels") if name in row}
    for name, values in kept.items():
        if len(values) != len(mask):
            raise ValueError(f"expected an attention_mask of one value per {name} ({len(values)}), got {len(mask)}")
    return {name: [v for v, real in zip(values, mask, strict=True) if real] for name, values in kept.items()}
