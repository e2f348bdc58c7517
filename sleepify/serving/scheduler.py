"""Who reads and who speaks in the next step: one thread owns the model and serves all sessions row by row.

Rows at different places of their windows go together, because a batch is its rows (contract 8). Every turn of the loop
makes one step of reading, up to the end of a window, and one token for every row that speaks:

    reading:   rows that speak whose window is full, first come first, and rows with text to read; at most one sleep
    speaking:  all others, one token each; nobody sleeps here

So those who speak wait for at most one sleep between two of their tokens, their own too, however much others read. Only
where more windows are full at once than fit a step (`READ_TOKENS`) do some wait for their turn.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sleepify.cache import SleepCache
from sleepify.generation import left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.precision import unchanged
from sleepify.serving.metrics import Metrics
from sleepify.serving.sampling import Sampling, choose
from sleepify.serving.spoken import Spoken

log = logging.getLogger("sleepify.serve")

ROWS = 64
READ_TOKENS = 4096


@dataclass(eq=False)
class Job:
    """One answer, or with ``sampling`` None a sleep of one session.

    Attributes:
        cache: the session of one row that it goes on from, None for a new one; afterwards, the session with all
            tokens read but the answer's last.
        todo: ids still to be read.
        sampling: how to answer.
        spoken: the answer so far.
        deliver: called in the model's thread with pieces of text, and then once with the end: a reason ("stop",
            "length", "slept") or an exception.
        cancelled: set from any thread; what was read is dropped.
        made: tokens of the answer, with the one that ended it.
        heard: the session when it had read all of ``todo`` and said nothing.
        over: whether the answer has come to its end, whatever becomes of those that were made beside it.
    """

    cache: SleepCache | None
    todo: Sequence[int]
    sampling: Sampling | None
    spoken: Spoken
    deliver: Callable[[str | Ended], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    generator: torch.Generator | None = None
    made: int = 0
    heard: SleepCache | None = None
    over: bool = False


@dataclass(frozen=True)
class Ended:
    """How an answer ended."""

    reason: str
    error: Exception | None = None


class Scheduler:
    """The model's thread.

    Args:
        model: which sleeps; in evaluation mode from now on. Its ``watch`` is set.
        stop_ids: tokens that end an answer.
        metrics: what is counted.
        rows: answers that are made at the same time; others wait.
    """

    def __init__(self, model: SleepForCausalLM, stop_ids: set[int], metrics: Metrics, rows: int = ROWS) -> None:
        self.model = model.eval()
        self.stop_ids, self.metrics, self.rows = stop_ids, metrics, rows
        self._device: torch.device = next(model.parameters()).device
        self._window = model.options().window_size
        self._arrived: deque[Job] = deque()
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._speaking: list[Job] = []
        self._together: SleepCache | None = None
        self._tokens: list[int] = []
        self._slept = 0
        self._wake = threading.Condition()
        self._closing = False
        model.watch = self._watch
        self._thread = threading.Thread(target=self._run, name="sleepify-model", daemon=True)
        self._thread.start()

    @property
    def unfinished(self) -> int:
        """Jobs that have not ended."""
        return len(self._arrived) + len(self._waiting) + len(self._reading) + len(self._speaking)

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Take a job in; from any thread."""
        with self._wake:
            if self._closing:
                raise RuntimeError("expected jobs before close(), got one after it")
            self._arrived.append(job)
            self._wake.notify()

    def close(self) -> None:
        """End what is left, and the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # --- the model's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.inference_mode(), unchanged(self.model):
            while self._take_in():
                self._attempt(self._drop_cancelled, list(self._speaking))
                self._attempt(self._set_aside, list(self._speaking))
                self._attempt(self._read, self._readers())
                # A text may end where its window does.
                self._attempt(self._set_aside, list(self._speaking))
                self._attempt(self._speak, list(self._speaking))
        for job in (*self._arrived, *self._waiting, *self._reading, *self._speaking):
            job.deliver(Ended("error", RuntimeError("the server is shutting down")))

    def _take_in(self) -> bool:
        """Wait for work; False when there will be none."""
        with self._wake:
            while not (self._closing or self._arrived or self._waiting or self._reading or self._speaking):
                self._wake.wait()
            while self._arrived:
                self._waiting.append(self._arrived.popleft())
        while self._waiting and len(self._reading) + len(self._speaking) < self.rows:
            self._reading.append(job := self._waiting.popleft())
            self._attempt(self._begin, [job])
        for queue in (self._waiting, self._reading):
            for job in [job for job in queue if job.cancelled.is_set()]:
                queue.remove(job)
                job.deliver(Ended("cancelled"))
        return not self._closing

    def _begin(self, jobs: list[Job]) -> None:
        for job in jobs:
            job.generator = None if job.sampling is None else job.sampling.generator()
            if job.cache is not None:
                job.cache = job.cache.clone().to(self._device)

    def _attempt(self, step: Callable[[list[Job]], None], jobs: list[Job]) -> None:
        """A step that fails ends those who took part in it, and nobody else."""
        if not jobs:
            return
        try:
            step(jobs)
        except Exception as error:
            log.exception("a step of %d rows failed", len(jobs))
            ended = dict.fromkeys(jobs)
            try:
                self._leave([job for job in jobs if job in self._speaking])
            except Exception:
                # Where there is no room to take others' rows out from among theirs.
                ended |= dict.fromkeys(self._speaking)
                self._speaking, self._tokens, self._together = [], [], None
            for job in ended:
                if job in self._reading:
                    self._reading.remove(job)
                if not job.over:
                    job.cache = None
                    job.deliver(Ended("error", error))

    def _drop_cancelled(self, jobs: list[Job]) -> None:
        gone = [job for job in jobs if job.cancelled.is_set()]
        self._leave(gone)
        for job in gone:
            job.cache = None
            job.deliver(Ended("cancelled"))

    def _watch(self, sleep: Any, memory: Any) -> None:
        self._slept += len(sleep.rows)

    # --- reading ---------------------------------------------------------------------------------------------------

    def _readers(self) -> list[Job]:
        """Who reads now: the first in the queue, and those of its kind up to a number of tokens."""
        chosen: list[Job] = []
        left = READ_TOKENS
        for job in self._reading:
            if chosen and (_kind(job) != _kind(chosen[0]) or job.sampling is None):
                continue
            count, full = self._next_piece(job)
            left -= count + (self._window if full else 0)
            if chosen and left < 0:
                break
            chosen.append(job)
        return chosen

    def _next_piece(self, job: Job) -> tuple[int, bool]:
        """How many tokens, at most up to the end of a window, and whether a sleep comes before them."""
        have = job.cache.open_lengths[0] if job.cache is not None and job.cache.now is not None else 0
        full = have == self._window
        return min(len(job.todo), self._window - (0 if full else have)), full

    def _read(self, jobs: list[Job]) -> None:
        begun, self._slept = time.perf_counter(), 0
        if jobs[0].sampling is None:
            self._nap(jobs[0], begun)
            return
        counts = [self._next_piece(job)[0] for job in jobs]
        pieces = [torch.tensor(job.todo[:count]) for job, count in zip(jobs, counts, strict=True)]
        ids, mask = left_padded(pieces)
        caches = [job.cache for job in jobs if job.cache is not None]
        together = SleepCache.join(caches) if caches else SleepCache()
        scores = self._forward(ids, mask, together)
        # The others read their own answers on, behind a full window.
        self.metrics.read(sum(count for job, count in zip(jobs, counts, strict=True) if not job.made))
        self._count_sleep(begun)
        for job, cache, count in zip(jobs, together.split(), counts, strict=True):
            self._reading.remove(job)
            job.cache, job.todo = cache, job.todo[count:]
            if job.todo:
                self._reading.append(job)
            elif job.heard is None:
                job.heard = cache
        self._say([job for job in jobs if not job.todo], scores[[not job.todo for job in jobs]])

    def _nap(self, job: Job, begun: float) -> None:
        assert job.cache is not None
        self.model.sleep(job.cache)
        self._count_sleep(begun)
        self._reading.remove(job)
        self._end(job, "slept")

    def _forward(self, ids: Tensor, mask: Tensor | None, cache: SleepCache) -> Tensor:
        """Scores [B, V] after the last column."""
        # A mask is for the host, and ids need not be waited for.
        mask = None if mask is None or bool(mask.all()) else mask
        ids = ids.to(self._device, non_blocking=True)
        output = self.model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        return output.logits[:, -1]

    def _count_sleep(self, begun: float) -> None:
        if self._slept:
            self.metrics.slept(self._slept, time.perf_counter() - begun)

    # --- speaking --------------------------------------------------------------------------------------------------

    def _set_aside(self, jobs: list[Job]) -> None:
        """Those who speak and whose window is full sleep in a step of reading, before others read, in their order."""
        assert self._together is not None
        full = []
        for job, token, have in zip(jobs, self._tokens, self._together.open_lengths, strict=True):
            if have == self._window:
                job.todo = [token]
                full.append(job)
        self._leave(full)
        waiting = sum(job.made > 0 for job in self._reading)
        for place, job in enumerate(full, waiting):
            self._reading.insert(place, job)

    def _speak(self, jobs: list[Job]) -> None:
        assert self._together is not None
        scores = self._forward(torch.tensor(self._tokens)[:, None], None, self._together)
        together, self._together, self._speaking, self._tokens = self._together, None, [], []
        self._say(jobs, scores, together)

    def _say(self, jobs: list[Job], scores: Tensor, together: SleepCache | None = None) -> None:
        """The next token of rows that have read everything; who goes on joins those who speak.

        Args:
            jobs: the rows.
            scores: [B, V].
            together: their sessions as one, if they are so already.
        """
        if not jobs:
            return
        samplings = [job.sampling for job in jobs if job.sampling is not None]
        tokens = choose(scores, samplings, [job.generator for job in jobs])
        going, ended = [], []
        for row, (job, token) in enumerate(zip(jobs, tokens, strict=True)):
            reason = self._spoken(job, token)
            if reason is None:
                going.append(row)
            else:
                ended.append((row, reason))
        for row, reason in ended:
            if together is not None:
                jobs[row].cache = _row(together, row)
            self._end(jobs[row], reason)
        if not going:
            return
        if together is None:
            parts = [jobs[row].cache for row in going]
            together = SleepCache.join([cache for cache in parts if cache is not None])
        elif ended:
            together.batch_select_indices(going)
        self._together = together if self._together is None else SleepCache.join([self._together, together])
        for row in going:
            jobs[row].cache = None
        self._speaking += [jobs[row] for row in going]
        self._tokens += [token for row in going if (token := tokens[row]) is not None]

    def _spoken(self, job: Job, token: int | None) -> str | None:
        """Take a token into an answer; why that ends with it, None if it goes on."""
        assert job.sampling is not None
        if token is None:
            return "error"
        job.made += 1
        self.metrics.spoke(1)
        if token in self.stop_ids:
            return "stop"
        if text := job.spoken.add(token):
            job.deliver(text)
        if job.spoken.stopped:
            return "stop"
        return "length" if len(job.spoken.ids) >= job.sampling.max_tokens else None

    def _end(self, job: Job, reason: str) -> None:
        job.over = True
        if reason == "error":
            job.cache = None
            job.deliver(Ended("error", ValueError("the model's scores are not finite")))
            return
        if text := job.spoken.finish():
            job.deliver(text)
        job.cache = _settled(job.cache)
        job.heard = _settled(job.heard)
        # A stop text may have been among what was held back.
        job.deliver(Ended("stop" if job.spoken.stopped else reason))

    def _leave(self, jobs: list[Job]) -> None:
        """Take rows out of those who speak, each with its own session again."""
        if not jobs or self._together is None:
            return
        gone = set(map(id, jobs))
        stay = [row for row, job in enumerate(self._speaking) if id(job) not in gone]
        for row, job in enumerate(self._speaking):
            if id(job) in gone:
                job.cache = _row(self._together, row)
        if len(stay) < len(self._speaking):
            if stay:
                self._together.batch_select_indices(stay)
            else:
                self._together = None
            self._tokens = [self._tokens[row] for row in stay]
            self._speaking = [self._speaking[row] for row in stay]


def _kind(job: Job) -> tuple[bool, bool]:
    """Sessions that have read nothing have nothing to be joined with others."""
    return job.sampling is None, job.cache is None


def _row(cache: SleepCache, row: int) -> SleepCache:
    one = cache.clone()
    one.batch_select_indices([row])
    return one


def _settled(cache: SleepCache | None) -> SleepCache | None:
    """On the CPU, in memory of its own and no more than it needs."""
    if cache is None:
        return None
    settled = cache.clone().to("cpu")
    if settled.now is not None:
        settled.now = settled.now.map(lambda tensor: tensor.clone(), ids=True)
    return settled


def stop_ids_of(model: SleepForCausalLM, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, as `generate` has them; the tokenizer's if the model has none."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if known is None else known
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}
