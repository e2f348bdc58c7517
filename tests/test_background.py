"""A sleep in the background gives what a sleep at the token where it was asked for gives, whatever came meanwhile."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import talking
import torch
from families import ATTENTION, FAMILIES, tokens, true_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from small import sleeping
from tolerances import EXACT, GROWN, assert_close

from sleepify import Session, SleepCache
from sleepify import sleep as algorithm


@pytest.fixture(scope="module", params=["hard", "sliding"])
def model(request):
    return sleeping(eviction=request.param, window_size=5, n_loops=2)


class Held:
    """Sleeps are held back in their thread until they are let go, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go, self.error, self.begun = threading.Event(), error, 0

    def __call__(self, *_) -> None:
        self.begun += 1
        if threading.current_thread() is not threading.main_thread():
            assert self.go.wait(60)
            if self.error is not None:
                raise self.error


@pytest.fixture
def held(model):
    held = model.watch = Held()
    yield held
    held.go.set()
    model.watch = None


@torch.no_grad()
def read(model, cache, text, **keywords):
    return model(torch.tensor([text]), past_key_values=cache, **keywords).logits[0]


def begun(model, text=(5, 6, 7, 8, 9, 10, 11)):
    cache = SleepCache()
    read(model, cache, list(text))
    return cache


def assert_close_sessions(mine: SleepCache, theirs: SleepCache, tolerance=EXACT) -> None:
    """Equal in counts, ids and values, once both have read everything."""
    for name in ("seen", "windows", "open_lengths", "passes", "pending", "ephemeral"):
        assert getattr(mine, name) == getattr(theirs, name), name
    for name in ("retained", "stale", "columns", "owner"):
        assert getattr(mine.now, name) == getattr(theirs.now, name), name
    assert torch.equal(mine.now.open_ids, theirs.now.open_ids) and torch.equal(mine.now.digest, theirs.now.digest)
    # Row by row, since what stands before the keys of a shorter row means nothing.
    for left, right in zip(mine.split(), theirs.split(), strict=True):
        for one, other in zip(left.memory.tensors(), right.memory.tensors(), strict=True):
            assert_close(one, other, tolerance)


# --- the definition ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 9), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 3), st.integers(1, 7))
def test_it_is_the_sleep_at_the_token_where_it_was_asked_for(model, before, pieces, done_after, after):
    """Texts of any length, some of it before the sleep is done, in any number of calls."""
    text = tokens(1, before + sum(pieces) + after, seed=before)[0].tolist()
    model.watch = Held()
    mine, theirs = begun(model, text[:before]), begun(model, text[:before])
    model.watch.begun = 0
    assert model.sleep(mine, background=True) is mine and mine.is_sleeping
    model.sleep(theirs)
    place, sleeps = before, True
    for number, piece in enumerate(pieces):
        if number == done_after:
            model.watch.go.set()
            mine.wait()
            sleeps = False
        if sleeps and place - before + piece > 5:
            # There is no room for more without it.
            sleeps = False
            threading.Timer(0.01, model.watch.go.set).start()
        read(model, mine, text[place : place + piece])
        read(model, theirs, text[place : place + piece])
        assert mine.is_sleeping == sleeps
        assert mine.seen == theirs.seen
        place += piece
    model.watch.go.set()
    mine.wait()
    assert not mine.is_sleeping
    for name in ("seen", "windows", "open_lengths", "passes", "pending"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert_close(read(model, mine, text[place:]), read(model, theirs, text[place:]), EXACT)
    assert_close_sessions(mine, theirs)
    model.watch = None


def test_tokens_that_come_meanwhile_see_the_old_window(model, held):
    """Their logits are those of a window without an end, not those behind the sleep."""
    mine, plain = begun(model, [5, 6, 7]), begun(model, [5, 6, 7])
    model.sleep(mine, background=True)
    assert_close(read(model, mine, [8, 9]), read(model, plain, [8, 9]), EXACT)
    slept = begun(model, [5, 6, 7])
    model.sleep(slept)
    assert (read(model, plain, [10]) - read(model, slept, [10])).abs().max() > 1e-3
    # Beyond L tokens in all: the old window stays, in front of another one.
    assert read(model, mine, [10, 11]).shape[0] == 2 and mine.open_lengths == [7] and mine.windows == [0]
    assert mine.is_sleeping


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = sleeping(family, window_size=3, n_loops=2, **({} if family in ATTENTION else {"fast_weights": None}))
    text = tokens(1, 7)[0].tolist()
    with true_float64():
        mine, theirs = begun(model, text[:4]), begun(model, text[:4])
        if model.blocks.changes_modules:
            with pytest.raises(ValueError, match=f"that several threads may call .* got rows=None.*{family}"):
                model.sleep(mine, background=True)
            assert not mine.is_sleeping
            return
        model.sleep(mine, background=True)
        model.sleep(theirs)
        for cache in (mine, theirs):
            read(model, cache, text[4:6])
        mine.wait()
        assert_close(read(model, mine, text[6:]), read(model, theirs, text[6:]), GROWN)
        assert_close_sessions(mine, theirs, GROWN)


def test_rows_that_stand_at_different_places(model, held):
    ids, mask = tokens(3, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1]])
    more, shown = tokens(3, 3, seed=1), torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 1]])
    caches = SleepCache(), SleepCache()
    for cache in caches:
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            model.sleep(cache, background=cache is caches[0])
            model(more, attention_mask=shown, past_key_values=cache)
            if cache is caches[0]:
                held.go.set()
                cache.wait()
            model(more[:, :1], past_key_values=cache)
    assert_close_sessions(*caches)


def test_what_is_pending_is_slept_on(model, held):
    """Also where nothing is read meanwhile, and where generation goes on meanwhile."""
    how = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    caches = []
    for background in (True, False):
        for goes_on in (False, True):
            cache = SleepCache()
            model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, **how)
            assert cache.pending[0]
            held.go.clear() if background else held.go.set()
            model.sleep(cache, background=background)
            if goes_on:
                model.generate(
                    torch.tensor([[8]]), past_key_values=cache, new_tokens=True, **how | {"min_new_tokens": 2}
                )
                if not background:
                    cache.rewind(2)
            if background:
                assert cache.is_sleeping
                held.go.set()
                cache.wait()
                if goes_on:
                    cache.rewind(2)
            read(model, cache, [9])
            caches.append(cache)
    assert_close_sessions(caches[0], caches[2])
    assert_close_sessions(caches[1], caches[3])


# --- what waits, and what does not ------------------------------------------------------------------------------------


@pytest.fixture
def pair(model, held):
    """A session of which a sleep is being made, with two tokens that came since; and what it will be."""
    mine, theirs = begun(model), begun(model)
    model.sleep(mine, background=True)
    model.sleep(theirs)
    for cache in (mine, theirs):
        read(model, cache, [12, 13])
    assert mine.is_sleeping
    threading.Timer(0.05, held.go.set).start()
    return mine, theirs


def test_copies_share_it(model, held, pair):
    mine, theirs = pair
    other = mine.clone()
    assert other.is_sleeping
    read(model, other, [14])
    for cache in (mine, other):
        cache.wait()
    assert other.seen == [10] and mine.seen == [9]
    for cache in (mine, theirs):
        read(model, cache, [14])
    read(model, other, [15])
    assert_close_sessions(mine, theirs)
    assert held.begun == 4, "two of reading, one in the background, one in front"


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_other_copies_wait(model, pair, way):
    mine, theirs = pair
    other = way(mine)
    assert not other.is_sleeping and mine.is_sleeping
    for cache in (other, theirs):
        read(model, cache, [14])
    assert_close_sessions(other, theirs)


def test_a_file_waits(model, pair, tmp_path):
    mine, theirs = pair
    mine.save(tmp_path / "session")
    loaded = SleepCache.load(tmp_path / "session")
    for cache in (loaded, theirs):
        read(model, cache, [14])
    assert_close_sessions(loaded, theirs)


@pytest.mark.parametrize(
    "act",
    [
        lambda model, cache: cache.rewind(1),
        lambda model, cache: cache.batch_select_indices([0]),
        lambda model, cache: cache.batch_repeat_interleave(2),
        lambda model, cache: cache.to("cpu"),
        lambda model, cache: model.sleep(cache),
        lambda model, cache: model.sleep(cache, n_loops=1, background=True).wait(),
        lambda model, cache: read(model, cache, [14, 15, 16, 17]),
        lambda model, cache: read(model, cache, [14, 15], ephemeral=torch.tensor([[True, False]])),
        lambda model, cache: model.generate(
            torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]),
            past_key_values=cache,
            max_new_tokens=2,
            do_sample=False,
        ),
    ],
)
def test_what_cannot_go_on_meanwhile_waits(model, pair, act):
    for cache in pair:
        act(model, cache)
        assert not cache.is_sleeping
        model(torch.tensor([[20]] * len(cache.seen)), past_key_values=cache)
    assert_close_sessions(*pair)


def test_joining_waits(model, pair):
    mine, theirs = pair
    joined = SleepCache.join([mine, theirs])
    with torch.no_grad():
        model(torch.tensor([[14], [14]]), past_key_values=joined)
    assert_close_sessions(*joined.split())


def test_taking_back_goes_no_further_than_the_sleep(model, pair):
    with pytest.raises(ValueError, match=r"at most \[2\] tokens"):
        pair[0].rewind(3)


def test_an_older_value_has_no_part_in_it(model, held):
    cache = begun(model)
    before = cache.now
    model.sleep(cache, background=True)
    cache.now = before
    held.go.set()
    assert not cache.is_sleeping
    read(model, cache, [12])
    assert_close_sessions(cache, begun(model, [5, 6, 7, 8, 9, 10, 11, 12]))


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("came", [0, 2, 4])
def test_one_that_fails_was_not_asked_for(model, held, came):
    """The error comes once, with the call that would have found it done; no token is lost, none read twice."""
    text = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    cache = begun(model, text[:7])
    held.error = MemoryError("no more")
    model.sleep(cache, background=True)
    if came:
        read(model, cache, text[7 : 7 + came])
    held.go.set()
    cache.now.nap.making._thread.join()
    before = cache.now
    with pytest.raises(MemoryError, match="no more"):
        read(model, cache, text[7 + came :])
    assert cache.now is before
    held.error = None
    read(model, cache, text[7 + came :])
    theirs = begun(model, text[:7])
    if came:
        read(model, theirs, text[7 : 7 + came])
    read(model, theirs, text[7 + came :])
    assert not cache.is_sleeping
    assert_close_sessions(cache, theirs)


@pytest.mark.parametrize("pending", [False, True])
def test_generation_that_finds_it_failed(model, held, pending):
    """generate puts the session back as it was, and the error is not raised for ever."""
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    mine, theirs = SleepCache(), SleepCache()
    for cache in (mine, theirs):
        if pending:
            model.generate(torch.tensor([[5, 6, 7]]), past_key_values=cache, **how)
        else:
            read(model, cache, [5, 6, 7])
    held.error = RuntimeError("out of luck")
    model.sleep(mine, background=True)
    held.go.set()
    mine.now.nap.making._thread.join()
    with pytest.raises(RuntimeError, match="out of luck"):
        model.generate(torch.tensor([[8]]), past_key_values=mine, new_tokens=True, **how)
    made = [
        model.generate(torch.tensor([[8]]), past_key_values=cache, new_tokens=True, **how) for cache in (mine, theirs)
    ]
    assert made[0].tolist() == made[1].tolist()
    assert_close_sessions(mine, theirs)


def test_waiting_for_one_that_fails(model, held):
    cache = begun(model)
    held.error = MemoryError("no more")
    model.sleep(cache, background=True)
    held.go.set()
    with pytest.raises(MemoryError):
        cache.wait()
    assert cache.wait().windows == [1] and not cache.is_sleeping and cache.open_lengths == [2]


def test_what_cannot_be_is_refused_before_anything_moves(model):
    cache = begun(model)
    before = cache.now
    for wrong in ({"rows": [0]}, {"training": True}):
        model.train(wrong.pop("training", False))
        with pytest.raises(ValueError, match="expected background=True for all rows, in evaluation"):
            model.sleep(cache, background=True, **wrong)
        model.eval()
    with pytest.raises(ValueError, match="expected a cache that has read something"):
        model.sleep(SleepCache(), background=True)
    assert cache.now is before


# --- several ----------------------------------------------------------------------------------------------------------


def test_several_sessions_sleep_at_once(model, held):
    texts = [tokens(1, 7, seed)[0].tolist() for seed in range(4)]
    mine, theirs = [begun(model, text) for text in texts], [begun(model, text) for text in texts]
    for cache in mine:
        model.sleep(cache, background=True)
    for cache in theirs:
        model.sleep(cache)
    for number in range(3):
        for cache in (*mine, *theirs):
            read(model, cache, [12 + number])
    assert all(cache.is_sleeping for cache in mine)
    held.go.set()
    for one, other in zip(mine, theirs, strict=True):
        one.wait()
        read(model, one, [20])
        read(model, other, [20])
        assert_close_sessions(one, other)


def test_the_thread_has_the_callers_autocast_and_no_gradient(model, held):
    seen = []
    model.watch = lambda *_: seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
    cache = begun(model, [5, 6, 7])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.sleep(cache, background=True)
    cache.wait()
    assert seen == [(False, True)]


def test_it_runs_beside_what_is_read(model, monkeypatch):
    """The consolidation happens in another thread than the reading, and while it goes on tokens are read."""
    order, go = [], threading.Event()
    consolidate = algorithm.consolidate

    def slow(*arguments):
        order.append("begins")
        assert go.wait(60)
        order.append("ends")
        return consolidate(*arguments)

    cache = begun(model, [5, 6, 7])
    monkeypatch.setattr(algorithm, "consolidate", slow)
    model.sleep(cache, background=True)
    read(model, cache, [8])
    order.append("read")
    go.set()
    cache.wait()
    assert order in (["begins", "read", "ends"], ["read", "begins", "ends"])


# --- text in, text out ------------------------------------------------------------------------------------------------


def test_a_session_goes_on_meanwhile(tmp_path):
    model, words = talking.talker(), talking.tokenizer()
    model.watch = held = Held()
    with true_float64():
        mine, theirs = Session(model, words), Session(model, words)
        for session in (mine, theirs):
            session.read("a cab had")
        assert mine.sleep(background=True) is mine and mine.cache.is_sleeping
        theirs.sleep()
        for session in (mine, theirs):
            session.read("a bed")
        assert mine.ask("egg", max_new_tokens=2) is not None and mine.cache.is_sleeping
        fork = mine.fork()
        held.go.set()
        mine.save(tmp_path / "session")
        loaded = Session.load(tmp_path / "session", model, words)
        how = {"max_new_tokens": 5, "keep": True}
        answer = theirs.ask("who?", **how)
        for session in (mine, fork, loaded):
            assert session.ask("who?", **how) == answer
        for session in (mine, theirs):
            session.undo().read("x")
        assert_close_sessions(mine.cache, theirs.cache)
        assert mine.undo().undo().undo().cache.windows == [0], "before the sleep, with its tokens awake"
        read(model, mine.cache, [20])


def test_a_sessions_sleep_that_fails():
    model, words = talking.talker(), talking.tokenizer()
    model.watch = held = Held(MemoryError("no more"))
    held.go.set()
    session = Session(model, words).read("a cab had")
    before = session.ask("who?", max_new_tokens=3)
    session.sleep(background=True)
    session.cache.now.nap.making._thread.join()
    with pytest.raises(MemoryError):
        session.read("x")
    assert session.ask("who?", max_new_tokens=3) == before
