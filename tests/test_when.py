"""When a session sleeps by itself: at the end of a document or a turn, and when idle; and README's example."""

from __future__ import annotations

import gc
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import talking
from families import true_float64
from test_session import QUESTIONS, STORY, same

from sleepify import Session, SleepForCausalLM
from sleepify.idle import IdleTimer

ROOT = Path(__file__).resolve().parent.parent
SOON, NEVER = 0.05, 3600.0


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with true_float64():
        yield


@pytest.fixture
def model() -> SleepForCausalLM:
    return talking.talker()


@pytest.fixture
def words():
    return talking.tokenizer()


def until(happened, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


# --- at a boundary ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["document", "turn"])
def test_a_document_ends_asleep(model, words, boundary) -> None:
    session = Session(model, words, sleep_at=boundary).read(STORY).read("a bad bed", n_loops=2)
    by_hand = Session(model, words).read(STORY).sleep().read("a bad bed", n_loops=2).sleep(n_loops=2)
    same(session.cache, by_hand.cache)
    assert session.cache.open_lengths == [0] and session.cache.passes == [2]
    same(session.undo().cache, Session(model, words).read(STORY).sleep().cache)


def test_a_turn_ends_asleep(model, words) -> None:
    session, by_hand = Session(model, words, sleep_at="turn"), Session(model, words)
    for text in ("who?", "and then?"):
        assert session.say(text, max_new_tokens=5) == by_hand.say(text, max_new_tokens=5)
        by_hand.sleep()
        same(session.cache, by_hand.cache)
    assert session.messages == by_hand.messages and session.cache.open_lengths == [0]
    session.ask("egg", keep=True, max_new_tokens=3)
    by_hand.ask("egg", keep=True, max_new_tokens=3)
    same(session.cache, by_hand.sleep().cache)
    windows = session.cache.windows
    session.ask("egg", max_new_tokens=3)
    assert session.cache.windows == windows
    once = Session(model, words)
    once.say("who?", max_new_tokens=5)
    same(session.undo().undo().cache, once.sleep().cache)


def test_a_document_is_no_turn(model, words) -> None:
    session = Session(model, words, sleep_at="document")
    session.say("who?", max_new_tokens=3)
    assert session.cache.open_lengths != [0]


def test_how_often_is_for_every_call(model, words) -> None:
    model.config.n_loops, model.config.auto_threshold = 6, 0.3
    session = Session(model, words, sleep_at="turn").read(STORY, n_loops="auto")
    passes = session.cache.passes[0]
    same(session.cache, Session(model, words).read(STORY, n_loops="auto").sleep(n_loops="auto").cache)
    assert 3 <= passes <= 6
    session.say("a hag had a bad egg", n_loops=2, max_new_tokens=3)
    assert session.cache.passes == [2]


def test_a_turn_reads_its_text_in_as_many_passes_as_it_is_told(model, words) -> None:
    """The question is longer than a window."""
    session = Session(model, words)
    answer = session.say(STORY, n_loops=1, max_new_tokens=5)
    model.config.n_loops = 1
    assert answer == Session(model, words).say(STORY, max_new_tokens=5)
    assert session.cache.passes == [1]


def test_forks_and_files(model, words, tmp_path) -> None:
    session = Session(model, words, sleep_at="document").read(STORY)
    assert session.fork().read("a bed").cache.open_lengths == [0]
    session.save(tmp_path / "it")
    assert Session.load(tmp_path / "it", model, words).read("a bed").cache.open_lengths != [0]
    loaded = Session.load(tmp_path / "it", model, words, sleep_at="document")
    assert loaded.read("a bed").cache.open_lengths == [0]


# --- when idle --------------------------------------------------------------------------------------------------------


def test_an_idle_session_sleeps(model, words) -> None:
    before = set(threading.enumerate())
    with Session(model, words, idle_sleep=SOON).read(STORY) as session:
        until(lambda: session.cache.open_lengths == [0])
        same(session.cache, Session(model, words).read(STORY).sleep().cache)
        answers = session.ask(QUESTIONS, max_new_tokens=5)
        assert answers == Session(model, words).read(STORY).sleep().ask(QUESTIONS, max_new_tokens=5)
        session.undo()
        assert session.cache.now is None, "the sleep is part of the step"
    until(lambda: set(threading.enumerate()) <= before)


def test_a_conversation_goes_on_after_it(model, words) -> None:
    by_hand = Session(model, words)
    with Session(model, words, idle_sleep=SOON) as session:
        for text in ("who?", "and then?"):
            assert session.say(text, max_new_tokens=5) == by_hand.say(text, max_new_tokens=5)
            by_hand.sleep()
            until(lambda: session.cache.open_lengths == [0] and not any(session.cache.pending))
        same(session.cache, by_hand.cache)


def test_it_waits_for_calls_and_calls_for_it(model, words, monkeypatch) -> None:
    """Whoever is first, the other begins when it has ended: what comes out is one of the two orders."""
    inside: list[str] = []
    sleep = type(model).sleep

    def slow(self, *args, **kwargs):
        inside.append("sleeps")
        time.sleep(0.2)
        done = sleep(self, *args, **kwargs)
        inside.append("slept")
        return done

    monkeypatch.setattr(type(model), "sleep", slow)
    session = Session(model, words, idle_sleep=SOON).read(STORY)
    until(lambda: inside == ["sleeps"])
    session.read("a bad bed")
    assert inside[:2] == ["sleeps", "slept"]
    session.close()
    monkeypatch.undo()
    same(session.cache, Session(model, words).read(STORY).sleep().read("a bad bed").cache)


def test_a_call_puts_it_off(model, words) -> None:
    session = Session(model, words, idle_sleep=NEVER).read(STORY)
    old = session._idle._timer
    session.ask("who?", max_new_tokens=2)
    assert session._idle._timer is not old
    # One that had come due while the call was under way finds that something has happened since.
    session._idle._due(old)
    assert session.cache.open_lengths != [0]
    session._idle._due(session._idle._timer)
    assert session.cache.open_lengths == [0]
    session.close()


def test_a_sleep_that_fails_leaves_the_session_as_it_was(model, words, monkeypatch, caplog) -> None:
    session = Session(model, words, idle_sleep=NEVER).read(STORY)
    now = session.cache.now

    def fails(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(type(model), "sleep", fails)
    session._idle._due(session._idle._timer)
    assert session.cache.now is now and "sleeping while idle failed" in caplog.text
    session.close()


def test_a_dropped_session_is_not_kept_alive(model, words) -> None:
    session = Session(model, words, idle_sleep=NEVER).read(STORY)
    gone, timer = weakref.ref(session), session._idle
    del session
    gc.collect()
    assert gone() is None
    timer.close()


def test_forks_sleep_too_but_not_those_of_questions(model, words) -> None:
    started: list[IdleTimer] = []
    with Session(model, words, idle_sleep=NEVER).read(STORY) as session:
        other = session.fork().read("a bed")
        started += [session._idle, other._idle]
        assert other._idle is not session._idle and other._idle._timer is not None
        n_threads = threading.active_count()
        session.ask(QUESTIONS, max_new_tokens=2)
        assert threading.active_count() <= n_threads
        other.close()
    assert all(each._timer is None for each in started)


def test_forks_and_files_sleep_before_they_are_called(model, words, tmp_path) -> None:
    session = Session(model, words).read(STORY)
    session.save(tmp_path / "it")
    with Session.load(tmp_path / "it", model, words, idle_sleep=SOON) as loaded:
        until(lambda: loaded.cache.open_lengths == [0])
    with Session(model, words, idle_sleep=NEVER).read(STORY) as session, session.fork() as other:
        assert other._idle._timer is not None
        other._idle._due(other._idle._timer)
        assert other.cache.open_lengths == [0] != session.cache.open_lengths


def test_what_a_user_can_get_wrong(model, words) -> None:
    with pytest.raises(ValueError, match="expected sleep_at to be 'document', 'turn' or None, got 'sentence'"):
        Session(model, words, sleep_at="sentence")
    for wrong in (0, -1, float("inf"), float("nan"), True, "5"):
        with pytest.raises(ValueError, match="expected idle_sleep to be seconds above 0, or None"):
            Session(model, words, idle_sleep=wrong)


# --- the example ------------------------------------------------------------------------------------------------------


def test_readmes_session_is_what_users_type(model, words, tmp_path, monkeypatch, capsys) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "Session(" in code]
    assert all(f"session.{name}(" in example for name in ("read", "ask", "say", "fork", "save"))
    monkeypatch.chdir(tmp_path)
    names = talking.run_example(example, model, words, STORY * 9, monkeypatch)
    session = names["session"]
    assert isinstance(session, Session) and Path("book.safetensors").exists()
    same(session.cache, names["other"].cache)
    plain = Session(names["model"], words).read(STORY * 9).sleep()
    assert plain.ask("Who wrote the letter?") in capsys.readouterr().out.splitlines()
