"""The server under load and bad luck: who waits for whom, what comes between two steps, what fails half way."""

from __future__ import annotations

import asyncio
import errno
import json
import re
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="the server is asked without a network")

from served import WINDOW, tiny  # noqa: E402

from sleepify import SleepCache  # noqa: E402
from sleepify.serving import asked as asking  # noqa: E402
from sleepify.serving import scheduler as serving  # noqa: E402
from sleepify.serving import store as storing  # noqa: E402
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
    """Twenty at once, of whom one sleeps per step: the first fills its next window before the last has slept."""
    monkeypatch.setattr(serving, "READ_TOKENS", WINDOW + 1)
    log = Log(Scheduler(made[0], set(), Metrics()))
    names = [f"number {place}" for place in range(20)]
    log.run([log.job(name, 3, 40) for name in names])
    assert max(max(log.waits(name)) for name in names) <= len(names) + 1


def test_who_does_not_read_a_stream_holds_nothing(made, monkeypatch):
    monkeypatch.setattr("sleepify.serving.api._TO_FETCH", 0.2)
    app = create_app(*made, "tiny", limits=Limits(seconds=0.5))
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}

    async def receive():
        if not received:
            received.append(True)
            return {"type": "http.request", "body": json.dumps(asked).encode()}
        await asyncio.sleep(60)

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    received: list[bool] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
             "headers": [(b"content-type", b"application/json")], "http_version": "1.1"}  # fmt: skip

    async def main():
        engine = app.state.engine
        await asyncio.wait_for(app(scope, receive, send), 60)
        while engine.scheduler.unfinished:
            await asyncio.sleep(0.01)
        assert len(engine.store) == 0
        await engine.close()

    asyncio.run(main())


def test_a_burst_beyond_the_limit_is_refused(made, tmp_path):
    """All of them ask before the first has been written as tokens."""
    asked = Asked([{"role": "user", "content": "hi"}], Sampling(temperature=0, max_tokens=2), False)

    async def main():
        engine = Engine(*made, Limits(waiting=3), tmp_path, None)
        burst = await asyncio.gather(*(engine.turn(asked, KEY, None, "sess") for _ in range(8)), return_exceptions=True)
        refused = [each for each in burst if isinstance(each, Refusal)]
        assert len(refused) == 5 and {each.status for each in refused} == {429}
        for turn in burst:
            if turn not in refused:
                turn.close()
        (await engine.turn(asked, KEY, None, "sess")).close()
        await engine.close()

    asyncio.run(main())


async def running(app):
    """How many requests the server says it is answering."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        said = (await http.get("/metrics")).text
    return float(re.search(r"^sleepify_requests_running (.+)$", said, re.MULTILINE)[1])


def test_a_turn_counts_until_it_is_written(made, tmp_path):
    asked = Asked([{"role": "user", "content": "hi"}], Sampling(temperature=0, max_tokens=2), True)
    app = create_app(*made, "tiny", folder=tmp_path)

    async def main():
        engine = app.state.engine
        turn = await engine.turn(asked, KEY, None, "sess")
        assert [piece async for piece in turn.pieces()]
        while engine.scheduler.unfinished:
            await asyncio.sleep(0.01)
        assert await running(app) == 1
        assert (await turn.finish()).text
        turn.close()
        assert await running(app) == 0
        await engine.close()

    asyncio.run(main())


def test_an_answers_tokens_are_no_prompts(made):
    """Those that are read behind a full window, too."""
    asked = Asked([{"role": "user", "content": "hello there you"}], Sampling(temperature=0, max_tokens=40), True)

    async def main():
        engine = Engine(*made, Limits(), None, None)
        turn = await engine.turn(asked, KEY, None, "sess")
        assert [piece async for piece in turn.pieces()]
        made_now = (await turn.finish()).made
        assert made_now > WINDOW
        said = engine.metrics.text({}).splitlines()
        assert {f"sleepify_tokens_read_total {len(turn.ids)}", f"sleepify_tokens_generated_total {made_now}"} <= {*said}
        turn.close()
        await engine.close()

    asyncio.run(main())


# --- what comes between two steps ------------------------------------------------------------------------------------


async def kept(store, model, ids, named=False, key=KEY):
    session = store.new(key, named=named)
    await store.keep(session, read(model, ids), [{"role": "user", "content": "x"}], ids)
    return session


def test_a_fork_is_of_one_moment(made, tmp_path):
    """A turn that ends while the memory is fetched from disk."""
    model, ids = made[0], list(range(6, 6 + 2 * WINDOW + 5))

    async def main():
        store = Store(read(model, ids).owner, tmp_path, 0, 10)
        session = await kept(store, model, ids)
        assert session.cache is None
        more = [*ids, *range(6, 6 + WINDOW)]
        moved = store.keep(session, read(model, more), [{"role": "user", "content": "y"}], more)
        other, _ = await asyncio.gather(store.fork(session), moved)
        cache = await store.cache_of(other)
        assert (cache.seen, other.tokens) == ([len(more)], len(more)) and other.messages == session.messages

    asyncio.run(main())


def test_a_session_that_is_erased_while_it_is_forked_has_no_fork(made, tmp_path):
    model, ids = made[0], list(range(6, 20))

    async def main():
        store = Store(read(model, ids).owner, tmp_path, 0, 10)
        session = await kept(store, model, ids)
        other, _ = await asyncio.gather(store.fork(session), store.erase(session))
        assert other is None and len(store) == 0

    asyncio.run(main())
    assert not list(tmp_path.iterdir())


def test_a_key_never_has_more_sessions_than_it_may(made, tmp_path):
    model, ids = made[0], list(range(6, 20))

    async def main():
        store = Store(read(model, ids).owner, tmp_path, 1 << 30, 3)
        for _ in range(3):
            await kept(store, model, ids)
        await asyncio.gather(*(kept(store, model, ids) for _ in range(6)))
        assert len(store.of(KEY)) == 3
        # What is forked was called by its id, and does not give way to its own fork.
        first, *others = store.of(KEY)
        for each in others:
            await store.name(each)
        with pytest.raises(TooManySessionsError):
            await store.fork(first)
        assert len(store.of(KEY)) == 3
        await store.close()
        again = Store(store.owner, tmp_path, 1 << 30, 3)
        assert sorted(each.named for each in again.of(KEY)) == [False, True, True]
        await again.close()

    asyncio.run(main())


def test_a_session_is_erased_in_its_first_turn(made, tmp_path):
    """Its id is in the header of a stream that has not ended."""

    async def main():
        engine = Engine(*made, Limits(), tmp_path, None)
        asked = Asked([{"role": "user", "content": "a secret"}], Sampling(temperature=0, max_tokens=30), True)
        turn = await engine.turn(asked, KEY, None, "sess")
        (session,) = turn.kept
        assert engine.store.get(session.id, KEY) is None and engine.store.begun(session.id, key_hash("bob")) is None
        await engine.store.erase(engine.store.begun(session.id, KEY))
        assert [piece async for piece in turn.pieces()]
        assert (await turn.finish()).text and len(engine.store) == 0
        assert engine.store.begun(session.id, KEY) is None
        turn.close()
        await engine.close()

    asyncio.run(main())
    assert not list(tmp_path.iterdir())


# --- what fails half way ---------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "no space left on device")


@pytest.mark.parametrize("what", [(SleepCache, "save"), (Path, "write_text")])
def test_a_turn_that_cannot_be_written_did_not_happen(made, tmp_path, monkeypatch, what):
    model, ids = made[0], list(range(6, 6 + 2 * WINDOW + 5))
    more = [*ids, *range(6, 6 + WINDOW)]

    def shown(session):
        return session.turn, session.tokens, session.windows, session.messages, session.cache.seen, session.used

    async def main():
        store = Store(read(model, ids).owner, tmp_path, 1 << 30, 10)
        session = await kept(store, model, ids)
        before, files, held = shown(session), {each.name for each in tmp_path.iterdir()}, store.bytes
        with monkeypatch.context() as broken:
            broken.setattr(*what, full)
            for act in (
                lambda: store.keep(session, read(model, more), [{"role": "user", "content": "y"}], more),
                lambda: store.keep_slept(session, model.sleep(read(model, ids))),
                lambda: store.fork(session),
                lambda: kept(store, model, ids),
            ):
                with pytest.raises(OSError, match="no space"):
                    await act()
                assert shown(session) == before and len(store) == 1 and store.bytes == held
                assert {each.name for each in tmp_path.iterdir()} == files
                assert store.longest_prefix(KEY, [*more, 6]) == (session, len(ids))
        await store.keep(session, read(model, more), [{"role": "user", "content": "y"}], more)
        assert [each.stat().st_mode & 0o777 for each in tmp_path.iterdir()] == [0o600, 0o600]
        assert store.longest_prefix(KEY, [*more, 6]) == (session, len(more))
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["too many", "no space"])
def test_a_response_that_cannot_be_kept_moves_no_session(made, tmp_path, monkeypatch, why):
    """Nor is there a response where its session cannot be moved: a client that asks again is as one that never did."""
    asked = Asked([{"role": "user", "content": "hi"}], Sampling(temperature=0, max_tokens=2), True)

    async def main():
        engine = Engine(*made, Limits(sessions=1 if why == "too many" else 10), tmp_path, None)
        session = await kept(engine.store, made[0], list(range(6, 20)), named=True)
        before, files = session.turn, {each.name for each in tmp_path.iterdir()}
        write = storing.write
        # The response comes first.
        for good in (0, 1):
            left = [good]

            def writing(*arguments, left=left):
                left[0] -= 1
                return write(*arguments) if left[0] >= 0 else full()

            if why == "no space":
                monkeypatch.setattr(storing, "write", writing)
            turn = await engine.turn(asked, KEY, session.id, "resp")
            assert [piece async for piece in turn.pieces()]
            with pytest.raises(Refusal if why == "too many" else OSError):
                await turn.finish()
            turn.close()
            assert (session.turn, len(session.messages), len(engine.store)) == (before, 1, 1)
            assert {each.name for each in tmp_path.iterdir()} == files
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("fails", [False, True])
def test_a_write_that_nobody_waits_for_any_more_comes_to_its_end(made, tmp_path, monkeypatch, fails):
    """Its client goes away while it waits its turn; memory and disk then say the same."""
    model, ids = made[0], list(range(6, 6 + WINDOW + 5))
    more = [*ids, *range(6, 6 + WINDOW)]

    async def main():
        store = Store(read(model, ids).owner, tmp_path, 1 << 30, 10)
        session = await kept(store, model, ids)
        gate = threading.Event()
        store._files.submit(gate.wait, 60)
        if fails:
            monkeypatch.setattr(storing, "write", full)
        moving = asyncio.create_task(store.keep(session, read(model, more), [{"role": "user", "content": "y"}], more))
        await asyncio.sleep(0.05)
        for _ in range(2):
            moving.cancel()
            await asyncio.sleep(0.05)
        gate.set()
        with pytest.raises(OSError if fails else asyncio.CancelledError):
            await moving
        record = json.loads((tmp_path / f"{session.id}.json").read_text(encoding="utf-8"))
        assert (record["turn"], record["messages"]) == (session.turn, session.messages)
        assert session.turn == (1 if fails else 2) and len(list(tmp_path.iterdir())) == 2
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "damage", [None, {"windows": ...}, {"open_ids": None}, {"open_ids": ["a"]}, {"messages": [[]]}]
)
def test_a_record_that_cannot_be_read_is_left_alone(made, tmp_path, monkeypatch, damage):
    """For a moment (too many open files), or because another version wrote it; nobody else's session suffers."""
    ids = list(range(6, 6 + WINDOW + 5))

    async def main():
        first = Store(read(made[0], ids).owner, tmp_path, 1 << 30, 10)
        session = await kept(first, made[0], ids)
        await first.close()
        record = tmp_path / f"{session.id}.json"
        fields = json.loads(record.read_text(encoding="utf-8")) | (damage or {})
        record.write_text(
            json.dumps({name: each for name, each in fields.items() if each is not ...}), encoding="utf-8"
        )
        files = {each.name for each in tmp_path.iterdir()}
        with monkeypatch.context() as broken:
            if damage is None:
                broken.setattr(Path, "read_text", full)
            again = Store(first.owner, tmp_path, 1 << 30, 10)
        assert {each.name for each in tmp_path.iterdir()} == files
        assert len(again) == 0 and again.longest_prefix(KEY, [*ids, 6]) == (None, 0)
        await again.close()

    asyncio.run(main())


def test_an_idle_sleep_that_fails_is_not_tried_at_every_tick(made, monkeypatch):
    ids, tried = list(range(6, 6 + WINDOW + 5)), []

    def fails(*_):
        tried.append(time.monotonic())
        raise ValueError("the state is not finite")

    async def main():
        engine = Engine(*made, Limits(), None, 3600)
        session = await kept(engine.store, made[0], ids)
        monkeypatch.setattr(type(made[0]), "sleep", fails)
        session.used -= 7200
        for _ in range(3):
            await engine._sleep_idle_ones(3600)
        assert len(tried) == 1 and len(session.open_ids) == 5
        await engine.close()

    asyncio.run(main())


def test_sessions_sleep_on_after_one_could_not(made, tmp_path, monkeypatch, caplog):
    ids = list(range(6, 6 + WINDOW + 5))

    async def main():
        engine = Engine(*made, Limits(), tmp_path, 0.1)
        session = await kept(engine.store, made[0], ids)
        with monkeypatch.context() as broken:
            broken.setattr(SleepCache, "save", full)
            engine.start()
            deadline = time.monotonic() + 60
            while "failed" not in caplog.text and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
            assert session.open_ids
        while session.open_ids and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert not session.open_ids and session.windows == 2
        await engine.close()

    asyncio.run(main())


def test_a_session_that_was_called_meanwhile_is_not_idle(made, tmp_path, monkeypatch):
    """It was idle when its turn to sleep was far off: others sleep first."""
    ids = list(range(6, 6 + WINDOW + 5))

    async def main():
        engine = Engine(*made, Limits(), tmp_path, 3600)
        first, second = [await kept(engine.store, made[0], ids) for _ in range(2)]
        for each in (first, second):
            each.used -= 7200
        nap, slept = engine._nap, []

        async def napping(session):
            slept.append(session)
            second.used = time.time()
            await nap(session)

        monkeypatch.setattr(engine, "_nap", napping)
        await engine._sleep_idle_ones(3600)
        assert slept == [first] and second.open_ids and not first.open_ids
        await engine.close()

    asyncio.run(main())


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_nothing_is_likelier_than_the_likeliest():
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    nothing = Sampling(temperature=1.5, top_p=0.0, seed=1)
    assert serving.choose(scores, [nothing], [nothing.generator()]) == [int(scores[0].argmax())]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"verbosity": "low"}, "verbosity"),
        ({"user": 5}, "user"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(place): "" for place in range(17)}}, "metadata"),
        ({"store": "yes"}, "store"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_no_field_is_ignored_that_asks_for_something(fields, param):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(Refusal) as refused:
        asking.chat(body | fields, "tiny", 10)
    assert (refused.value.status, refused.value.param) == (400, param)


def test_fields_that_change_no_answer_are_taken():
    idle = {"user": "me", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "verbosity": "medium"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    assert asking.chat(body | idle, "tiny", 10) == asking.chat(body, "tiny", 10)
    assert asking.response({"model": "tiny", "input": "hi", "metadata": {"a": "b"}}, "tiny", 10).metadata == {"a": "b"}
