"""Random programs of calls, and each row alone beside them: what test_fuzz.py runs.

A program is one model with settings of its own and some sessions, on which random calls are made: batches padded
anywhere, sleeps, generation, rewinding, joining. Every row of every session has a twin, which is read alone, unpadded,
one window at a time and with explicit sleeps; every logit, loss and state of the batch is compared with the twins'.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache as remembered
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from families import ATTENTION, FAMILIES, VOCAB
from small import sleeping
from tolerances import EXACT_GRAD, GROWN, assert_close
from torch import Tensor

from sleepify import FastWeightConfig, SleepCache, SleepForCausalLM
from sleepify.memory import LayerKey, LayerState, Memory
from sleepify.snapshot import Snapshot

IGNORE = -100
PAD = 0
# Of the calls of one program; long enough that sessions meet most other calls, short enough to name the one at fault.
CALLS_PER_PROGRAM = 25
MAX_ROWS = 4
# After so many tokens a row is not read on: within the positions of every base, and sums stay comparable in float64.
MAX_TEXT = 40


@dataclass(frozen=True)
class How:
    """Settings that a sleep depends on."""

    n_loops: int
    loop_range: tuple[int, int]


@remembered
def model_of(family: str, variant: int) -> SleepForCausalLM:
    """One of two models of a family, in float64: other rules, inserted elsewhere, or nothing inserted."""
    if family in ATTENTION:
        inserted = [FastWeightConfig(layers=[0, 2]), FastWeightConfig(rule="jet", layers=[1])][variant]
    else:
        inserted = [None, FastWeightConfig(rule="mamba2", layers=[2])][variant]
    return sleeping(family, fast_weights=inserted)


@remembered
def loop_ranges(family: str, variant: int) -> list[tuple[int, int]]:
    """All that this model can have."""
    model, valid = model_of(family, variant), []
    for bounds in combinations(range(len(model.blocks.layers) + 1), 2):
        model.config.loop_range = bounds
        try:
            model.options()
        except ValueError:
            continue
        valid.append(bounds)
    return valid


class Row:
    """One row as it should be, read alone.

    Attributes:
        closed: the ids of every window slept on, and how.
        open: ids of the open window.
        pending: ids that `generate` made and did not read.
        stale: whether the batch has this row's open window still to read again.
        start, alone: its own session, at the start of the open window and now.
    """

    def __init__(self, model: SleepForCausalLM) -> None:
        self.model, self.size = model, model.config.window_size
        self.closed: list[tuple[list[int], How]] = []
        self.open: list[int] = []
        self.pending: list[int] = []
        self.stale = False
        self.start, self.alone = SleepCache(), SleepCache()

    def copy(self) -> Row:
        other = copy.copy(self)
        other.closed, other.open, other.pending = [*self.closed], [*self.open], [*self.pending]
        other.start, other.alone = self.start.clone(), self.alone.clone()
        return other

    @property
    def text(self) -> list[int]:
        """All that it read or holds, in order."""
        return [id_ for ids, _ in self.closed for id_ in ids] + self.open + self.pending

    def read(self, ids: list[int], how: How) -> Tensor:
        """Read what is pending and these, alone; the logits [n, V] of these."""
        waiting, logits = self.pending, [torch.zeros(0, VOCAB, dtype=torch.float64)]
        text, self.pending, self.stale = waiting + ids, [], False
        while text:
            if len(self.open) == self.size:
                self.sleep(how)
            piece = text[: self.size - len(self.open)]
            text = text[len(piece) :]
            logits.append(self._read(piece))
            self.open += piece
        return torch.cat(logits)[len(waiting) :]

    def sleep(self, how: How) -> None:
        """Sleep, if anything is awake."""
        if not self.open:
            return
        _sleep(self.alone, self.model, how)
        self.closed.append((self.open, how))
        self.open, self.stale, self.start = [], False, self.alone.clone()

    def rewind(self, n: int) -> None:
        """Without the last n ids."""
        unread = min(n, len(self.pending))
        self.pending = self.pending[: len(self.pending) - unread]
        if n > unread:
            self.open = self.open[: len(self.open) - (n - unread)]
            self.alone, self.stale = self.start.clone(), True
            if self.open:
                self._read(self.open)

    def replayed(self) -> SleepCache:
        """A new session that reads the same text with the same sleeps."""
        session = SleepCache()
        for ids, how in self.closed:
            self.model(torch.tensor([ids]), past_key_values=session)
            _sleep(session, self.model, how)
        if self.open:
            self.model(torch.tensor([self.open]), past_key_values=session)
        return session

    @torch.no_grad()
    def _read(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), past_key_values=self.alone).logits[0]


@torch.no_grad()
def _sleep(session: SleepCache, model: SleepForCausalLM, how: How) -> None:
    now = model.config.loop_range
    model.config.loop_range = how.loop_range
    model.sleep(session, n_loops=how.n_loops)
    model.config.loop_range = now


def assert_row(session: Snapshot, row: int, twin: Row, what: str) -> None:
    """Row ``row`` of a session is as its twin."""
    mine, theirs = session.select([row]), twin.alone.now
    if theirs is None:
        assert mine.seen == mine.open_lengths == mine.windows == (0,), what
        assert not any(tensor.count_nonzero() for tensor in mine.memory.tensors()), what
        return
    waiting = [ids.tolist() for ids in mine.pending] or [[]]
    assert waiting == [twin.pending], f"{what}: pending {waiting}, expected {twin.pending}"
    for name in ("open_lengths", "retained", "seen", "windows", "passes", "digest"):
        assert getattr(mine, name) == getattr(theirs, name), f"{what}: {name}"
    assert mine.open_ids[0, : len(twin.open)].tolist() == twin.open, f"{what}: open window"
    assert mine.stale == (twin.stale,), f"{what}: stale"
    _assert_state(mine.at_start, theirs.at_start, f"{what}: at the start")
    if not twin.stale:
        _assert_state(mine.memory.state, theirs.memory.state, f"{what}: now")
        _assert_keys(mine.memory, theirs.memory, what)


def _assert_state(mine: dict[LayerKey, LayerState], theirs: dict[LayerKey, LayerState], what: str) -> None:
    for key in mine.keys() | theirs.keys():
        nothing = LayerState()
        for left, right in zip(mine.get(key, nothing), theirs.get(key, nothing), strict=True):
            # What was never written is zero beside a row that has written it.
            if left is not None or right is not None:
                left = torch.zeros_like(right) if left is None else left
                right = torch.zeros_like(left) if right is None else right
                assert_close(left, right, GROWN, f"{what}, state {key}")


def _assert_keys(mine: Memory, theirs: Memory, what: str) -> None:
    assert mine.kv_lengths == theirs.kv_lengths, f"{what}: {mine.kv_lengths} keys, expected {theirs.kv_lengths}"
    length = mine.kv_lengths[0]
    if length:
        assert mine.kv.keys() == theirs.kv.keys(), what
        for layer, pair in mine.kv.items():
            for left, right in zip(pair, theirs.kv[layer], strict=True):
                ends = left.shape[2] - length, right.shape[2] - length
                assert_close(left[:, :, ends[0] :], right[:, :, ends[1] :], GROWN, f"{what}, keys of layer {layer}")


@dataclass
class Session:
    """One of a program's sessions, and the twins of its rows."""

    cache: SleepCache
    rows: list[Row]

    def check(self, what: str) -> None:
        """Everything that it holds is what each row alone holds."""
        assert len(self.cache.seen) in (0, len(self.rows)), what
        if self.cache.now is not None:
            for row, twin in enumerate(self.rows):
                assert_row(self.cache.now, row, twin, f"{what}: row {row}")


@dataclass
class Batch:
    """Random new ids of some rows, laid out with padding.

    Attributes:
        new: per row, what is new.
        places: per row, the columns where it stands.
        ids, mask: as the model takes them.
    """

    new: list[list[int]]
    places: list[list[int]]
    ids: Tensor
    mask: Tensor | None
    width: int = field(init=False)

    def __post_init__(self) -> None:
        self.width = self.ids.shape[1]

    def spread(self, logits: list[Tensor]) -> Tensor:
        """What each row gave, [n, V], where it stands; 0 at padding."""
        whole = torch.zeros(len(self.new), self.width, VOCAB, dtype=torch.float64)
        for row, (place, values) in enumerate(zip(self.places, logits, strict=True)):
            whole[row, place] = values
        return whole


class Program:
    """One random program.

    Args:
        seed: says everything about it.
        family: one of tests/families.py; drawn if not given.
    """

    def __init__(self, seed: int, family: str | None = None) -> None:
        self.random = random.Random(seed)
        self.seed, self.log = seed, []
        family, variant = family or self.random.choice(list(FAMILIES)), self.random.randrange(2)
        self.model, self.ranges = model_of(family, variant), loop_ranges(family, variant)
        config = self.model.config
        config.window_size, config.eviction = self.random.randint(1, 6), self.random.choice(["hard", "sliding"])
        self.model.eval()
        self.change_settings()
        self.name = f"seed {seed}: {family}/{variant}, L={config.window_size}, {config.eviction}"
        self.sessions: list[Session] = []
        self.n_calls = 0

    OPS: tuple[tuple[str, int], ...] = (
        ("read", 10), ("read_alone", 5), ("look", 2), ("train", 2), ("generate", 4), ("sleep", 3), ("clone", 2),
        ("rewind", 3), ("pick", 2), ("split_and_join", 2), ("join_two", 1), ("save_and_load", 1),
        ("change_settings", 2), ("read_and_drop", 1), ("sleep_behind", 1),
    )  # fmt: skip

    def run(self, n_calls: int = CALLS_PER_PROGRAM) -> int:
        """So many calls, and their number; raises at the first wrong value, naming the seed and all calls before."""
        names, weights = zip(*self.OPS, strict=True)
        try:
            while self.n_calls < n_calls:
                getattr(self, self.random.choices(names, weights)[0])()
                self.n_calls += 1
            self.check()
        except (Exception, KeyboardInterrupt) as error:
            raise AssertionError("\n".join([f"{self.name}", *self.log, f"{type(error).__name__}: {error}"])) from error
        return self.n_calls

    def check(self) -> None:
        """All sessions against their twins, and one row of each against a session that reads its text anew."""
        for number, session in enumerate(self.sessions):
            session.check(f"session {number} at the end")
            row = self.random.randrange(len(session.rows))
            anew = session.rows[row].copy()
            anew.alone = anew.replayed()
            if session.cache.now is not None:
                assert_row(session.cache.now, row, anew, f"session {number}, row {row} read anew")

    # --- drawing ---------------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def say(self, *words: Any) -> None:
        self.log.append(" ".join(map(str, words)))

    @property
    def size(self) -> int:
        return self.model.config.window_size

    def session(self) -> Session:
        """One of those there are, or a new one."""
        alive = [each for each in self.sessions if all(len(row.text) < MAX_TEXT for row in each.rows)]
        if not alive or self.chance(0.1):
            rows = [Row(self.model) for _ in range(self.random.randint(1, MAX_ROWS))]
            session = Session(SleepCache(fixed_shapes=self.chance(0.25)), rows)
            self.keep(session)
            return session
        return self.random.choice(alive)

    def begun(self) -> Session:
        """One that has read something."""
        while all(each.cache.now is None for each in self.sessions):
            self.read()
        return self.random.choice([each for each in self.sessions if each.cache.now is not None])

    def keep(self, session: Session) -> None:
        self.sessions = [*self.sessions, session][-3:]

    def how(self, **call: Any) -> tuple[How, dict[str, Any]]:
        """How a call sleeps, and the keywords that say so."""
        if self.chance(0.4):
            call["n_loops"] = self.random.randint(1, 3)
        config = self.model.config
        return How(call.get("n_loops") or config.n_loops, tuple(config.loop_range)), call

    def text(self, least: int = 0) -> list[int]:
        length = self.random.choice([0, 1, 1, 1, 2, self.size, self.random.randint(1, 2 * self.size + 3)])
        return [self.random.randrange(3, VOCAB) for _ in range(max(least, length))]

    def batch(self, new: list[list[int]], cache: SleepCache | None, contiguous: bool = False) -> Batch:
        """A layout of these, padded as the session allows."""
        width = max(1, *map(len, new)) + self.random.choice([0, 0, 0, 1, 2])
        left, places = cache is not None or contiguous, []
        for ids in new:
            some = range(width - len(ids), width)
            if ids and not contiguous and self.chance(0.5):
                some = sorted(self.random.sample(range(width - left), len(ids) - left)) + [width - 1] * left
            places.append(list(some))
        ids = torch.tensor([[self.random.randrange(VOCAB) for _ in range(width)] for _ in new])
        mask = torch.zeros(len(new), width, dtype=torch.long)
        for row, (place, values) in enumerate(zip(places, new, strict=True)):
            ids[row, place], mask[row, place] = torch.tensor(values, dtype=torch.long), 1
        if mask.all() and self.chance(0.5):
            return Batch(new, places, self.any_whole(ids), None)
        past = 0 if cache is None else cache.get_seq_length()
        if past and self.chance(0.3):
            mask = torch.cat([torch.randint(0, 2, (len(new), past)), mask], 1)
        dtypes = [torch.long, torch.bool, torch.int32, torch.uint8] + [torch.float32] * all(new)
        return Batch(new, places, self.any_whole(ids), mask.to(self.random.choice(dtypes)))

    def any_whole(self, ids: Tensor) -> Tensor:
        return ids.to(self.random.choice([torch.long, torch.long, torch.int32, torch.uint8]))

    def columns(self, width: int) -> tuple[Any, list[int]]:
        """A value for ``logits_to_keep``, and the columns that it means."""
        every, kind = list(range(width)), self.random.randrange(6)
        if kind < 2:
            return None, every
        if kind == 2:
            count = self.random.randint(0, width + 2)
            return count, every[-count:]
        if kind == 3:
            taken = [self.chance(0.4) for _ in every]
            return torch.tensor(taken), [column for column in every if taken[column]]
        chosen = [self.random.randrange(-width, width) for _ in range(self.random.randint(0, width + 2))]
        dtype = self.random.choice([torch.long, torch.int32])
        return torch.tensor(chosen, dtype=dtype), [column % width for column in chosen]

    def labels(self, batch: Batch) -> tuple[Tensor, Callable[[list[Tensor]], tuple[Tensor, int]]]:
        """Random labels, also at padding, and what gives their summed loss and number from the rows' logits."""
        share, shape = self.random.choice([0.0, 0.1, 0.5, 1.0]), (len(batch.new), batch.width)
        drawn = torch.tensor([[self.random.randrange(VOCAB) for _ in range(shape[1])] for _ in range(shape[0])])
        taken = torch.tensor([[self.chance(share) for _ in range(shape[1])] for _ in range(shape[0])])
        labels = torch.where(taken, drawn, IGNORE)

        def summed(logits: list[Tensor]) -> tuple[Tensor, int]:
            total, count = torch.zeros((), dtype=torch.float64), 0
            for row, (place, values) in enumerate(zip(batch.places, logits, strict=True)):
                targets = labels[row, place][1:]
                count += int((targets != IGNORE).sum())
                scores = values[: len(targets)]
                total = total + torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="sum")
            return total, count

        return labels, summed

    def grad(self) -> AbstractContextManager[Any]:
        return torch.set_grad_enabled(self.chance(0.2))

    # --- calls -----------------------------------------------------------------------------------------------------

    def call(self, batch: Batch, rows: list[Row], how: How, keywords: dict[str, Any]) -> Any:
        """Call the model with whatever is asked of it, and compare; the rows are moved on."""
        keep, columns = self.columns(batch.width)
        keywords |= {"attention_mask": batch.mask, "logits_to_keep": keep}
        labels, summed = self.labels(batch) if self.chance(0.35) else (None, None)
        if labels is not None:
            divided = self.random.choice([None, None, 3, torch.tensor(7)])
            keywords |= {"labels": labels, "num_items_in_batch": divided}
        if self.chance(0.2):
            keywords["awake"] = torch.rand(batch.ids.shape, generator=self.torch_random()) < 0.3
        shown = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in keywords.items()}
        self.say("   ", batch.ids.tolist(), shown)
        with self.grad():
            out = self.model(batch.ids, **keywords)
        logits = [row.read(ids, how) for row, ids in zip(rows, batch.new, strict=True)]
        if labels is None or keep is not None or not self.model.training:
            expected = batch.spread(logits)[:, columns]
            if columns or out.logits is not None:
                assert_close(out.logits, expected, GROWN, "logits")
        else:
            assert out.logits is None
        if summed is not None:
            total, count = summed(logits)
            assert_close(out.loss, total / (keywords["num_items_in_batch"] or max(1, count)), GROWN, "loss")
        return out

    def torch_random(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.random.randrange(2**31))

    def read(self) -> None:
        """A piece of text for every row of a session, or for some."""
        session = self.session()
        batch = self.batch([self.text() for _ in session.rows], session.cache)
        how, keywords = self.how(past_key_values=session.cache)
        self.say("read", self.sessions.index(session), how)
        trained = self.chance(0.1)
        self.model.train(trained)
        out = self.call(batch, session.rows, how, keywords | ({"use_cache": True} if self.chance(0.2) else {}))
        self.model.eval()
        assert out.past_key_values is session.cache
        if trained:
            if out.loss is not None and out.loss.requires_grad:
                out.loss.backward()
            session.cache.detach_()
            self.model.zero_grad()
        session.check("after reading")

    def look(self) -> None:
        """The same, but the session stays where it is."""
        session = self.session()
        before, rows = session.cache.now, [row.copy() for row in session.rows]
        batch = self.batch([self.text() for _ in rows], session.cache)
        how, keywords = self.how(past_key_values=session.cache, use_cache=False)
        self.say("look", self.sessions.index(session), how)
        out = self.call(batch, rows, how, keywords)
        assert out.past_key_values is None and session.cache.now is before

    def read_alone(self) -> None:
        """A batch without a session, which may begin one."""
        rows = [Row(self.model) for _ in range(self.random.randint(1, MAX_ROWS))]
        batch = self.batch([self.text(least=1) for _ in rows], None, contiguous=self.chance(0.3))
        right = any(place[-1] != batch.width - 1 for place in batch.places)
        how, keywords = self.how(use_cache=self.random.choice([None, False] if right else [None, False, True]))
        self.say("read alone", how)
        out = self.call(batch, rows, how, keywords)
        if out.past_key_values is not None:
            self.keep(Session(out.past_key_values, rows))
            self.sessions[-1].check("begun")

    def train(self) -> None:
        """A step of training against the sum of the rows' own steps."""
        rows = [Row(self.model) for _ in range(self.random.randint(1, 3))]
        batch = self.batch([self.text(least=1) for _ in rows], None)
        labels, _ = self.labels(batch)
        _, keywords = self.how()
        config = self.model.config
        config.backprop_loops, config.backprop_windows = (self.random.choice([None, None, 1, 2]) for _ in range(2))
        self.say("train", batch.ids.tolist(), None if batch.mask is None else batch.mask.tolist(), labels.tolist())
        self.say("   ", keywords, config.checkpoint, config.backprop_loops, config.backprop_windows)
        self.model.train().zero_grad()
        loss = self.model(batch.ids, attention_mask=batch.mask, labels=labels, **keywords).loss
        loss.backward()
        together = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        count = sum(int((labels[row, place[1:]] != IGNORE).sum()) for row, place in enumerate(batch.places))
        total = torch.zeros((), dtype=torch.float64)
        for row, (ids, place) in enumerate(zip(batch.new, batch.places, strict=True)):
            own = {"labels": labels[row : row + 1, place], "num_items_in_batch": max(1, count)}
            one = self.model(torch.tensor([ids]), **own, **keywords).loss
            one.backward()
            total += one.detach()
        assert_close(loss.detach(), total, GROWN, "loss in training")
        for name, parameter in self.model.named_parameters():
            mine, theirs = together.get(name), parameter.grad
            if mine is not None or theirs is not None:
                mine = torch.zeros_like(parameter) if mine is None else mine
                theirs = torch.zeros_like(parameter) if theirs is None else theirs
                assert_close(mine, theirs, EXACT_GRAD, f"gradient of {name}")
        self.model.eval().zero_grad()
        config.backprop_loops = config.backprop_windows = None

    def generate(self) -> None:
        """Greedily, with a session or without, from new tokens or whole conversations; rows may end early."""
        begins = self.chance(0.3)
        fixed = self.chance(0.3)
        if begins:
            session = Session(SleepCache(), [Row(self.model) for _ in range(self.random.randint(1, MAX_ROWS))])
        else:
            session = self.session()
        new = [self.text(least=1) for _ in session.rows]
        only_new = begins or self.chance(0.5)
        given = new if only_new else [row.text + ids for row, ids in zip(session.rows, new, strict=True)]
        # A session that nothing was read in takes a prompt in any case.
        batch = self.batch(given, SleepCache(), contiguous=self.chance(0.5))
        how, keywords = self.how(max_new_tokens=self.random.randint(1, self.size + 2), do_sample=False)
        ends = self.random.choice([None, self.random.sample(range(VOCAB), 20)])
        mask = batch.mask
        if mask is None and (batch.ids == PAD).any():
            # Without a mask transformers takes what a row made for padding, where it is the pad token.
            mask = torch.ones_like(batch.ids)
        keywords |= {"eos_token_id": ends, "attention_mask": mask, "return_dict_in_generate": True}
        if not begins:
            keywords["past_key_values"] = session.cache
        elif fixed:
            keywords["cache_implementation"] = "static"
        if only_new and not begins:
            keywords["new_tokens"] = True
        self.say("generate", None if begins else self.sessions.index(session), how, batch.ids.tolist(), keywords)
        out = self.model.generate(batch.ids.long(), **keywords)
        sequences = out.sequences[:, batch.width :].tolist()
        longest = 0
        for row, (twin, ids, made) in enumerate(zip(session.rows, new, sequences, strict=True)):
            length = next((n for n, id_ in enumerate(made, 1) if id_ in (ends or [])), len(made))
            assert not any(made[length:]), f"row {row}: made {made}, expected 0 after its end"
            # Greedy, if each was the likeliest after those before it.
            chosen = twin.read(ids + made[: length - 1], how)[len(ids) - 1 :].argmax(-1).tolist()
            assert made[:length] == chosen, f"row {row}: made {made[:length]}, expected {chosen}"
            twin.pending, longest = chosen[-1:], max(longest, length)
        assert longest == len(sequences[0]) and (ends or longest == keywords["max_new_tokens"]), sequences
        assert begins or out.past_key_values is session.cache
        if begins:
            session.cache = out.past_key_values
            self.keep(session)
        session.check("after generating")

    def sleep(self) -> None:
        """Some rows or all, full windows or not."""
        session = self.begun()
        rows = [row for row in range(len(session.rows)) if self.chance(0.6)]
        how, keywords = self.how()
        if self.chance(0.5):
            keywords["rows"] = rows
        else:
            rows = list(range(len(session.rows)))
        self.say("sleep", self.sessions.index(session), keywords)
        with self.grad():
            assert self.model.sleep(session.cache, **keywords) is session.cache
        for row in rows:
            if session.rows[row].pending:
                session.rows[row].read([], how)
            session.rows[row].sleep(how)
        session.check("after sleeping")

    def read_and_drop(self) -> None:
        """Ephemeral tokens, before and between ordinary ones, of which a file or a sleep knows nothing."""
        session = self.begun()
        new = [self.text() for _ in session.rows]
        shown = [[(self.random.randrange(VOCAB), True) for _ in range(self.random.randint(0, 2))] for _ in new]
        for row, ids in zip(shown, new, strict=True):
            for id_ in ids:
                row += [(id_, False)] + [(self.random.randrange(VOCAB), True)] * self.random.randrange(2)
        batch = self.batch([[id_ for id_, _ in row] for row in shown], session.cache, contiguous=True)
        own = torch.zeros(batch.ids.shape, dtype=torch.bool)
        for row, (place, texts) in enumerate(zip(batch.places, shown, strict=True)):
            own[row, place] = torch.tensor([flag for _, flag in texts], dtype=torch.bool)
        how, keywords = self.how(past_key_values=session.cache, attention_mask=batch.mask, ephemeral=own)
        self.say("read and drop", self.sessions.index(session), how, batch.ids.tolist(), own.tolist())
        with self.grad():
            self.model(batch.ids, **keywords)
        for row, (twin, ids) in enumerate(zip(session.rows, new, strict=True)):
            twin.read(ids, how)
            twin.stale = bool(session.cache.ephemeral[row] and twin.open)
        assert session.cache.now is not None
        session.cache.now = session.cache.now.lasting()
        session.check("after dropping what was ephemeral")

    def sleep_behind(self) -> None:
        """In the background, with tokens that come meanwhile, or nothing."""
        session = self.begun()
        if self.model.blocks.changes_modules:
            return
        how, keywords = self.how()
        batch = self.batch([self.text() for _ in session.rows], session.cache)
        self.say("sleep behind", self.sessions.index(session), keywords, batch.ids.tolist())
        self.model.sleep(session.cache, background=True, **keywords)
        for row in session.rows:
            row.read([], how)
            row.sleep(how)
        later = How(self.model.config.n_loops, how.loop_range)
        with self.grad():
            self.model(batch.ids, attention_mask=batch.mask, past_key_values=session.cache)
        session.cache.wait()
        assert session.cache.now is not None
        for row, (twin, ids) in enumerate(zip(session.rows, batch.new, strict=True)):
            twin.read(ids, later)
            twin.stale = session.cache.now.stale[row]
        session.check("after sleeping in the background")

    def clone(self) -> None:
        """A copy of one kind or another, beside the original."""
        session = self.session()
        ways = [SleepCache.clone, copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
        way = self.random.randrange(len(ways))
        self.say("clone", self.sessions.index(session), way)
        self.keep(Session(ways[way](session.cache), [row.copy() for row in session.rows]))
        self.sessions[-1].check("copied")

    def rewind(self) -> None:
        """Take back what is awake, for every row its own number or all the same, or crop."""
        session = self.begun()
        most = [len(row.open) + len(row.pending) for row in session.rows]
        counts = [self.random.randint(0, limit) for limit in most]
        kind, least = self.random.randrange(4), self.random.randint(0, min(most))
        self.say("rewind", self.sessions.index(session), counts if kind == 0 else least, kind)
        columns = session.cache.get_seq_length() + max(len(row.pending) for row in session.rows)
        if kind == 0:
            session.cache.rewind(counts)
        else:
            counts = [least] * len(most)
            if kind == 1 and columns >= least:
                session.cache.crop(columns - least)
            elif kind == 2 and least:
                session.cache.crop(-least)
            else:
                session.cache.rewind(least)
        for twin, count in zip(session.rows, counts, strict=True):
            twin.rewind(count)
        session.check("taken back")

    def pick(self) -> None:
        """Some rows of a session, in another order and repeated."""
        session = self.begun()
        batch = len(session.rows)
        chosen = [self.random.randrange(batch) for _ in range(self.random.randint(1, MAX_ROWS))]
        kind = self.random.randrange(5)
        self.say("pick", self.sessions.index(session), chosen, kind)
        if kind == 0:
            session.cache.batch_select_indices(chosen)
        elif kind == 1:
            session.cache.batch_select_indices(torch.tensor(chosen, dtype=torch.int32))
        elif kind == 2:
            taken = [row in chosen for row in range(batch)]
            session.cache.batch_select_indices(self.random.choice([taken, torch.tensor(taken)]))
            chosen = sorted(set(chosen))
        elif kind == 3:
            session.cache.reorder_cache(torch.tensor([row - batch for row in chosen]))
        else:
            repeats = self.random.randint(1, max(1, MAX_ROWS // batch))
            session.cache.batch_repeat_interleave(repeats)
            chosen = [row for row in range(batch) for _ in range(repeats)]
        session.rows = [session.rows[row].copy() for row in chosen]
        session.check("picked")

    def split_and_join(self) -> None:
        """A session taken apart, put together in another order; its parts are what its rows are."""
        session = self.begun()
        order = self.random.sample(range(len(session.rows)), self.random.randint(1, len(session.rows)))
        self.say("split and join", self.sessions.index(session), order)
        parts = session.cache.split()
        for part, row in zip(parts, session.rows, strict=True):
            Session(part, [row]).check("split")
        joined = SleepCache.join([parts[row] for row in order])
        self.keep(Session(joined, [session.rows[row].copy() for row in order]))
        self.sessions[-1].check("joined")

    def join_two(self) -> None:
        """Two sessions as one, wherever each stands."""
        one, other = self.begun(), self.begun()
        self.say("join", self.sessions.index(one), self.sessions.index(other))
        rows = [row.copy() for each in (one, other) for row in each.rows]
        joined = Session(SleepCache.join([one.cache, other.cache]), rows)
        if len(rows) > MAX_ROWS:
            joined.cache.batch_select_indices(list(range(MAX_ROWS)))
            joined.rows = rows[:MAX_ROWS]
        self.keep(joined)
        self.sessions[-1].check("joined")

    def save_and_load(self) -> None:
        """Through a file."""
        session = self.begun()
        self.say("save and load", self.sessions.index(session))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "session.safetensors")
            session.cache.save(path)
            session.cache = SleepCache.load(path)
        session.check("loaded")

    def change_settings(self) -> None:
        """On the live configuration."""
        config = self.model.config
        config.n_loops = self.random.randint(1, 3)
        config.loop_range = self.random.choice([list, tuple])(self.random.choice(self.ranges))
        config.checkpoint = self.random.choice(["none", "window", "loop"])
        config.offload, config.check_finite = self.chance(0.2), self.chance(0.2)
        self.say("settings", config.n_loops, config.loop_range, config.checkpoint, config.offload, config.check_finite)
