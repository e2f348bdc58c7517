"""What is answered: after every pass, after further windows, and without one of the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleepify.generation import left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.rows import NO_COLUMNS
from sleepify.settings import check_positive
from sleepify.tasks.base import IGNORE, Example


@dataclass(frozen=True)
class Answers:
    """What a model answers to Q queries, row by row; probabilities are over all tokens, given those before.

    Attributes:
        row: of each query, [Q].
        difficulty: of each, [Q].
        correct: whether every token of the answer was the first choice, [Q] bool.
        entropy: of the next token, mean over the tokens of the answer, in nats, [Q] float64.
        log_probability: of the right answer, [Q] float64.
        first: the first choice for the first token of the answer, [Q].
    """

    row: Tensor
    difficulty: Tensor
    correct: Tensor
    entropy: Tensor
    log_probability: Tensor
    first: Tensor

    def of(self, difficulty: int) -> Answers:
        """Those to queries of one difficulty."""
        those = self.difficulty == difficulty
        return Answers(*(value[those] for value in vars(self).values()))

    @property
    def accuracy(self) -> float:
        """Share of the queries answered."""
        return float(self.correct.double().mean())


@dataclass(frozen=True)
class Interference:
    """What is answered after further windows.

    Attributes:
        n_loops: numbers of passes that every window was slept on with.
        answers: per number of passes, those after 0 to K further windows.
    """

    n_loops: tuple[int, ...]
    answers: tuple[tuple[Answers, ...], ...]

    def accuracy(self) -> Tensor:
        """[numbers of passes, K + 1] float64."""
        return torch.tensor([[each.accuracy for each in row] for row in self.answers], dtype=torch.float64)


@dataclass(frozen=True)
class Attribution:
    """What each window adds to the right answers.

    Attributes:
        whole: the answers after all W windows.
        change: log-probability of the right answer with all windows less that without window w, [W, Q] float64, in
            nats: above 0 where the window helps.
    """

    whole: Answers
    change: Tensor


def answer(
    model: SleepForCausalLM,
    examples: Sequence[Example],
    *,
    n_loops: int | None = None,
    last_n_loops: int | None = None,
    batch_size: int = 64,
) -> Answers:
    """What a model answers to the queries of some rows.

    Args:
        model: which sleeps.
        examples: rows of a task, with queries; of any lengths.
        n_loops: N; by default the model's.
        last_n_loops: of the last sleep before the row's first answer, and of sleeps after that, if it is another: S_m
            is woken, with m passes, after a history of N.
        batch_size: rows at a time.

    Raises:
        ValueError: for no rows, rows without queries, or a query about a row's first token, which nothing predicts.
    """
    check_positive("batch_size", batch_size)
    if not examples:
        raise ValueError("expected at least one row to be answered, got none")
    windows = [_windows_before(example, model.options().window_size) for example in examples]
    found: list[list[tuple[int, int, bool, float, float, int]]] = [[] for _ in examples]
    was_training = model.training
    model.eval()
    try:
        for count in sorted(set(windows)):
            rows = [row for row, own in enumerate(windows) if own == count]
            for first in range(0, len(rows), batch_size):
                these = rows[first : first + batch_size]
                cut = count * model.options().window_size
                read = _log_probabilities(model, [examples[row] for row in these], cut, n_loops, last_n_loops)
                for row, known in zip(these, read, strict=True):
                    found[row] = [(row, *scored) for scored in _scored(examples[row], known, cut)]
    finally:
        model.train(was_training)
    columns = list(zip(*(query for row in found for query in row), strict=True))
    kinds = (torch.long, torch.long, torch.bool, torch.float64, torch.float64, torch.long)
    return Answers(*(torch.tensor(values, dtype=kind) for values, kind in zip(columns, kinds, strict=True)))


def answer_by_pass(
    model: SleepForCausalLM, examples: Sequence[Example], passes: Sequence[int], *, batch_size: int = 64
) -> list[Answers]:
    """What is answered from S_m, for every m of ``passes``; windows before the last are slept on with the model's N.

    Raises:
        ValueError: as `answer`.
    """
    return [answer(model, examples, last_n_loops=m, batch_size=batch_size) for m in passes]


def interference(
    model: SleepForCausalLM,
    examples: Sequence[Example],
    further: Sequence[Sequence[int]],
    n_loops: Sequence[int],
    *,
    batch_size: int = 64,
) -> Interference:
    """What is still answered after the first so many of some further windows, read between the text and the queries.

    Args:
        model: which sleeps.
        examples: rows of a task, whose text fills whole windows.
        further: what each row reads next, K windows of L ids.
        n_loops: numbers of passes to compare.
        batch_size: rows at a time.

    Raises:
        ValueError: for further text that is not whole windows, the same number for every row; and as `answer`.
    """
    size = model.options().window_size
    lengths = {len(ids) for ids in further}
    if len(further) != len(examples) or len(lengths) != 1 or max(lengths) % size:
        raise ValueError(
            f"expected further text of whole windows of {size} tokens, alike for each of {len(examples)} rows, got "
            f"{len(further)} texts of {sorted(lengths)} tokens"
        )
    longer = [
        [
            spliced(each, _windows_before(each, size) * size, 0, ids[:stop])
            for each, ids in zip(examples, further, strict=True)
        ]
        for stop in range(0, max(lengths) + 1, size)
    ]
    answers = tuple(tuple(answer(model, rows, n_loops=n, batch_size=batch_size) for rows in longer) for n in n_loops)
    return Interference(tuple(n_loops), answers)


def attribution(
    model: SleepForCausalLM, examples: Sequence[Example], *, n_loops: int | None = None, batch_size: int = 64
) -> Attribution:
    """What each window adds: the answers' log-probability with all windows, less that where one was never read.

    Under hard eviction a window that is read and not slept on is one that was never read.

    Args:
        model: which sleeps.
        examples: rows of a task, with equally many windows before the first answer.
        n_loops: N; by default the model's.
        batch_size: rows at a time.

    Raises:
        ValueError: for rows that differ in windows, or have none; and as `answer`.
    """
    size = model.options().window_size
    counts = {_windows_before(example, size) for example in examples}
    if len(counts) != 1 or not max(counts):
        raise ValueError(
            f"expected rows with equally many windows of {size} tokens before the first answer, at least one, got "
            f"{sorted(counts)}; probe rows of each number by themselves"
        )
    whole = answer(model, examples, n_loops=n_loops, batch_size=batch_size)
    changes = []
    for window in range(max(counts)):
        shorter = [spliced(example, window * size, size, ()) for example in examples]
        without = answer(model, shorter, n_loops=n_loops, batch_size=batch_size)
        changes.append(whole.log_probability - without.log_probability)
    return Attribution(whole, torch.stack(changes))


def spliced(example: Example, at: int, n_out: int, put_in: Sequence[int]) -> Example:
    """The row with other tokens, of which nothing is asked, in the place of ``n_out`` from column ``at`` on."""

    def changed(values: Sequence[int], new: Sequence[int]) -> list[int]:
        return [*values[:at], *new, *values[at + n_out :]]

    shift = len(put_in) - n_out
    queries = [replace(query, start=query.start + shift, stop=query.stop + shift) for query in example.queries]
    ids, labels = changed(example.input_ids, put_in), changed(example.labels, [IGNORE] * len(put_in))
    return Example(ids, labels, queries)


def _windows_before(example: Example, window_size: int) -> int:
    """Windows that a row has slept on when its first answer is predicted."""
    first = min((query.start for query in example.queries), default=0)
    if first < 1:
        raise ValueError("expected rows with queries, none of them about the first token; got one without, or with it")
    return (first - 1) // window_size


@torch.no_grad()
def _log_probabilities(
    model: SleepForCausalLM, examples: Sequence[Example], cut: int, n_loops: int | None, last_n_loops: int | None
) -> list[Tensor]:
    """Of the tokens that follow each from column ``cut`` on, [T - cut, V] float64; ``cut`` ends a window."""
    texts = [torch.tensor(example.input_ids, device=model.device) for example in examples]
    cache = None
    if cut:
        # The last window of these stays open: the next call sleeps on it, with its own N.
        before = torch.stack([text[:cut] for text in texts])
        cache = model(before, use_cache=True, n_loops=n_loops, logits_to_keep=NO_COLUMNS).past_key_values
    ids, mask = left_padded([text[cut:] for text in texts])
    last = n_loops if last_n_loops is None else last_n_loops
    logits = model(ids, attention_mask=mask, past_key_values=cache, n_loops=last, logits_to_keep=0).logits
    known = logits.double().log_softmax(-1).cpu()
    return [row[row.shape[0] - (len(text) - cut) :] for row, text in zip(known, texts, strict=True)]


def _scored(example: Example, known: Tensor, cut: int) -> list[tuple[int, bool, float, float, int]]:
    """Difficulty, whether right, entropy, log-probability and first choice of every query."""
    found = []
    for query in example.queries:
        at = known[query.start - 1 - cut : query.stop - 1 - cut]
        wanted, chosen = torch.tensor(example.input_ids[query.start : query.stop]), at.argmax(-1)
        # 0 log 0 is 0.
        entropy = -(at.exp() * at.clamp(min=torch.finfo(at.dtype).min)).sum(-1).mean()
        probability = at.gather(1, wanted[:, None]).sum()
        right = bool((chosen == wanted).all())
        found.append((query.difficulty, right, float(entropy), float(probability), int(chosen[0])))
    return found
