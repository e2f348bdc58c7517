"""Sessions whose sleeps nobody waits for: all that they answer and become is what it is where they are waited for."""

from __future__ import annotations

import threading

import pytest
import talking
import torch
from families import true_float64
from small import sleeping
from test_background import Held, assert_close_sessions

from sleepify import Session

SHORT = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def words():
    return talking.tokenizer()


@pytest.fixture
def model():
    return talking.talker()


@pytest.fixture
def held(model):
    """Sleeps in the background are held back until they are let go."""
    held = model.watch = Held()
    yield held
    held.go.set()


PIECES = ["a cab", " had a bad bed", "?", " and a fad, a dead bee and a cafe fed a gag", " x", "egg egg egg", " " * 12]
DOINGS = {
    "pieces": [("read", each) for each in PIECES],
    "questions between": [(what, each) for each in PIECES for what in ("read", "ask")],
    "a conversation": [("read", PIECES[1]), ("say", "who"), ("say", "and"), ("read", PIECES[3]), ("say", "why")],
    "kept, and taken back": [("read", PIECES[3]), ("keep", "who?"), ("read", "no"), ("undo", ""), ("keep", "and?")],
    "some of it for a while": [("read", "a cab had"), ("while", "abc"), ("read", "bed"), ("ask", "?"), ("read", "gag")],
    "slept on by hand": [("read", PIECES[1]), ("sleep", ""), ("read", PIECES[1]), ("fork", ""), ("read", "a")],
}


def do(session, what, text):
    if what == "fork":
        return session.fork().ask("who?", **SHORT)
    calls = {
        "read": lambda: session.read(text),
        "while": lambda: session.read(text, ephemeral=True),
        "ask": lambda: session.ask(text, **SHORT),
        "keep": lambda: session.ask(text, keep=True, **SHORT),
        "say": lambda: session.say(text, **SHORT),
        "undo": session.undo,
        "sleep": session.sleep,
    }
    made = calls[what]()
    return made if isinstance(made, str) else None


@pytest.mark.parametrize("sleep_at", [None, "document", "turn"])
@pytest.mark.parametrize("doings", DOINGS)
def test_nothing_but_who_waits_is_different(model, words, doings, sleep_at):
    with true_float64():
        mine = Session(model, words, sleep_at=sleep_at, background=True)
        theirs = Session(model, words, sleep_at=sleep_at)
        for what, text in DOINGS[doings]:
            assert do(mine, what, text) == do(theirs, what, text), (what, text)
            assert mine.messages == theirs.messages
        # One more letter, so that a window that is full has been slept on in both.
        for session in (mine, theirs):
            session.read("x")
            session.cache.wait()
            session._read(words("y", add_special_tokens=False)["input_ids"])
        mine.cache.wait()
        mine._read([20])
        theirs._read([20])
        assert_close_sessions(mine.cache, theirs.cache)


def test_reading_does_not_wait(model, words, held):
    """Nor does what comes meanwhile, up to a window; an answer does."""
    session = Session(model, words, background=True).read("a cab had a")
    assert not session.cache.is_sleeping, "no window is full"
    session.read(" bad bed")
    assert session.cache.is_sleeping
    session.read("egg")
    assert session.cache.is_sleeping and session.cache.windows == [0]
    asked = []
    asking = threading.Thread(target=lambda: asked.append(session.ask("who?", **SHORT)))
    asking.start()
    asking.join(0.5)
    assert not asked
    held.go.set()
    asking.join()
    assert asked == [Session(model, words).read("a cab had a").read(" bad bed").read("egg").ask("who?", **SHORT)]


def test_a_window_that_is_full_sleeps_at_once(model, words, held):
    """The last of a text, whether more of it follows or not; those before it are waited for."""
    window = int(model.config.window_size)
    for more in (0, 2):
        session = Session(model, words, background=True).read("," * (4 * window - 1 + more))
        assert session.cache.is_sleeping and session.cache.windows == [3]
        held.go.set()
        session.cache.wait()
        assert session.cache.windows == [4] and session.cache.open_lengths == [more]
        held.go.clear()


def test_boundaries_do_not_wait(model, words, held):
    session = Session(model, words, sleep_at="turn", background=True).read("a cab")
    assert session.cache.is_sleeping
    held.go.set()
    session.cache.wait()
    held.go.clear()
    assert session.say("who", **SHORT) is not None
    assert session.cache.is_sleeping


def test_what_is_read_for_a_while_is_not_slept_away(model, words, held):
    session = Session(model, words, background=True).read("x").read("???", ephemeral=True)
    session.read("," * (int(model.config.window_size) - 2))
    assert session.cache.open_lengths == [model.config.window_size] and session.cache.ephemeral == [3]
    assert not session.cache.is_sleeping


def test_it_is_taken_back_with_its_step(model, words, held):
    session = Session(model, words, background=True).read("a cab had a")
    before = session.cache.now
    session.read(" bad bed")
    assert session.cache.is_sleeping
    session.undo()
    assert session.cache.now is before


def test_one_that_fails_is_told_once(model, words):
    model.watch = held = Held(MemoryError("no more"))
    held.go.set()
    session = Session(model, words, background=True).read("a cab had a bad bed")
    with pytest.raises(MemoryError):
        session.ask("who?", **SHORT)
    model.watch = None
    assert session.ask("who?", **SHORT) == Session(model, words).read("a cab had a bad bed").ask("who?", **SHORT)


def test_repr_says_that_it_sleeps(model, words, held):
    session = Session(model, words, sleep_at="document", background=True).read("a cab")
    assert session.cache.is_sleeping and repr(session).endswith(" bytes, sleeping)")
    held.go.set()
    session.cache.wait()
    assert repr(session).endswith(" bytes)")


def test_forks_and_files(model, words, held, tmp_path):
    held.go.set()
    session = Session(model, words, background=True).read("a cab")
    assert session.fork().background
    session.save(tmp_path / "session")
    assert Session.load(tmp_path / "session", model, words, background=True).background
    assert not Session.load(tmp_path / "session", model, words).background


def test_what_cannot_be_is_refused(words):
    with pytest.raises(ValueError, match="True or False, got 'yes'"):
        Session(talking.talker(), words, background="yes")
    with torch.random.fork_rng(), pytest.raises(ValueError, match="zamba2, some of whose layers"):
        Session(sleeping("zamba2"), words, background=True)
