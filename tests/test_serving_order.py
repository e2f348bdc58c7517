"""The server under load and bad luck: who waits for whom, what comes between two steps, what fails half way."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")

from served import WINDOW, tiny  # noqa: E402

from sleepify import SleepCache  # noqa: E402
from sleepify.serving import asked as asking  # noqa: E402
from sleepify.serving import scheduler as serving  # noqa: E402
from sleepify.serving.api import create_app  # noqa: E402
from sleepify.serving.asked import Asked  # noqa: E402
from sleepify.serving.engine import Engine, Limits, key_hash  # noqa: E402
from sleepify.serving.metrics import Metrics  # noqa: E402
from sleepify.serving.refusals import Refusal  # noqa: E402
from sleepify.serving.sampling import Sampling  # noqa: E402
from sleepify.serving.scheduler import Ended, Job, Scheduler  # noqa: E402
from sleepify.serving.spoken import Spoken  # noqa: E402
from sleepify.serving.store import Store, TooManySessionsError  # noqa: E402

KEY = key_hash("alice")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def unwatched(made):
    yield
    made[0].watch = None


def read(model, ids, cache=None):
    cache = cache or SleepCache()
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    return cache


# --- who waits for whom ----------------------------------------------------------------------------------------------


class Log:
    """What happened, in order: the model's steps with the sleeps in each, and tokens of jobs by name."""

    def __init__(self, scheduler):
        self.seen, self.done, self.sleepers = [], threading.Semaphore(0), []
        self._scheduler, watch, forward = scheduler, scheduler.model.watch, scheduler._forward

        def watched(sleep, memory):
            self.seen.append("sleep")
            watch(sleep, memory)

        def step(*arguments):
            self.seen.append("step")
            return forward(*arguments)

        scheduler.model.watch, scheduler._forward = watched, step

    def job(self, name, length, limit):
        def deliver(event):
            self.seen.append(name)
            if isinstance(event, Ended):
                self.done.release()

        ids = torch.randint(6, 60, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        said = Spoken(lambda ids: "x" * len(ids))
        return Job(None, ids, Sampling(temperature=0, max_tokens=limit), said, deliver)

    def run(self, jobs):
        """All of them, handed over at once."""
        with self._scheduler._wake:
            self._scheduler._arrived.extend(jobs)
            self._scheduler._wake.notify()
        for _ in jobs:
            assert self.done.acquire(timeout=120)
        self._scheduler.close()

    def waits(self, name):
        """Between every two tokens of a job, how many steps had a sleep in them."""
        counts, now, fresh = [], 0, False
        for what in self.seen:
            if what == "step":
                fresh = False
            elif what == "sleep":
                now, fresh = now + (not fresh), True
            elif what == name:
                counts, now = [*counts, now], 0
        return counts[1:]


def test_never_more_than_one_sleep_step_between_two_tokens(made):
    """Also where a row's own window fills while others read and sleep in every step."""
    log = Log(Scheduler(made[0], set(), Metrics()))
    log.run([log.job("speaker", 3, 60), log.job("other", 9, 60), log.job("short", 150, 2), log.job("long", 640, 2)])
    assert sum(log.waits("speaker")) >= 60 // WINDOW
    assert max(log.waits("speaker")) == max(log.waits("other")) == 1


def test_where_more_windows_fill_than_fit_a_step_each_has_its_turn(made, monkeypatch):
    """Twenty at once, of whom one sleeps per step, so that the first fills its next window before the last has slept."""
    monkeypatch.setattr(serving, "READ_TOKENS", WINDOW + 1)
    log = Log(Scheduler(made[0], set(), Metrics()))
    names = [f"number {place}" for place in range(20)]
    log.run([log.job(name, 3, 40) for name in names])
    assert max(max(log.waits(name)) for name in names) <= len(names) + 1
