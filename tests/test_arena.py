"""Keys written into room that is there: a session stays a value, whoever reads on from it, and no token copies more."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import VOCAB, tiny_base, tokens, true_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import read_row
from small import sleeping
from test_contract import assert_same_session
from tolerances import EXACT, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.generation import utils as generation
from transformers.integrations import sdpa_attention

from sleepify import SleepCache


@pytest.fixture(autouse=True, scope="module")
def exactly():
    with true_float64(), torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["hard", "sliding"])
def model(request):
    return sleeping(eviction=request.param, window_size=7, n_loops=2).eval()


class Broke(Exception):
    pass


@contextmanager
def breaking(model, at: int):
    """The call fails in a layer, when those before it have written."""

    def fail(*_):
        raise Broke

    hook = model.blocks.layers[at].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


class Twins:
    """A session with room beside one without, and its text."""

    def __init__(self, fixed: SleepCache, usual: SleepCache, text: list[int]) -> None:
        self.fixed, self.usual, self.text = fixed, usual, text

    def fork(self) -> Twins:
        return Twins(self.fixed.clone(), self.usual.clone(), list(self.text))

    def read(self, model, ids: list[int]) -> None:
        mine, theirs = (model(torch.tensor([ids]), past_key_values=cache).logits for cache in (self.fixed, self.usual))
        self.text += ids
        assert_close(mine, theirs, EXACT, f"{self.fixed}")

    def check(self) -> None:
        assert_same_session(self.fixed, self.usual, "beside the session without room")


STEP = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 9)),
    st.tuples(st.just("one by one"), st.integers(1, 9)),
    st.tuples(st.just("fork"), st.integers(0, 5)),
    st.tuples(st.just("turn to"), st.integers(0, 5)),
    st.tuples(st.just("rewind"), st.integers(1, 4)),
    st.tuples(st.just("fail"), st.integers(0, 3)),
    st.tuples(st.just("sleep"), st.just(0)),
)


@settings(max_examples=15)
@given(program=st.lists(STEP, min_size=4, max_size=12), seed=st.integers(0, 99))
def test_whatever_is_done_with_a_session_the_values_are_the_same(model, program, seed):
    draw = torch.Generator().manual_seed(seed)
    sessions = [Twins(SleepCache(fixed_shapes=True), SleepCache(), [])]
    slept = set()
    now = sessions[0]
    now.read(model, [1, 2])
    for what, number in program:
        if what == "read":
            now.read(model, torch.randint(VOCAB, (number,), generator=draw).tolist())
        elif what == "one by one":
            for _ in range(number):
                now.read(model, torch.randint(VOCAB, (1,), generator=draw).tolist())
        elif what == "fork":
            sessions.append(now.fork())
            if id(now) in slept:
                slept.add(id(sessions[-1]))
        elif what == "turn to":
            now = sessions[number % len(sessions)]
        elif what == "rewind":
            count = min(number, now.usual.open_lengths[0])
            for cache in (now.fixed, now.usual):
                cache.rewind(count)
            del now.text[len(now.text) - count :]
        elif what == "fail":
            with breaking(model, number):
                for cache in (now.fixed, now.usual):
                    with pytest.raises(Broke):
                        model(tokens(1, 1), past_key_values=cache)
        elif now.usual.open_lengths[0]:
            for cache in (now.fixed, now.usual):
                model.sleep(cache)
            slept.add(id(now))
    for each in sessions:
        each.check()
        each.read(model, [3])
        if id(each) not in slept:
            logits = model(torch.tensor([[5]]), past_key_values=each.fixed).logits
            assert_close(logits[0, -1], read_row(model, torch.tensor([*each.text, 5])).logits[-1], EXACT, "by the book")


def test_rows_that_part_and_meet_again(model):
    """Rows at different steps, joined with others, taken apart, some of which have ended."""
    caches = [SleepCache(fixed_shapes=True), SleepCache()]
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :2] = mask[2, :5] = 0
    for t in range(24):
        if t == 6:
            caches = [SleepCache.join([cache, *cache.split()[:1]]) for cache in caches]
        if t == 15:
            caches = [SleepCache.join([part for part in cache.split() if part.seen != [0]][::-1]) for cache in caches]
        rows = 3 if t < 6 else 4
        ids = tokens(rows, 6 if t == 0 else 1, seed=t)
        real = mask if t == 0 else (torch.arange(rows) != 1).long()[:, None] if 18 < t < 22 else None
        one, other = (model(ids, attention_mask=real, past_key_values=cache).logits for cache in caches)
        assert_close(one, other, EXACT, f"token {t}")
        assert_same_session(*caches, f"token {t}")


def test_of_those_who_read_on_at_once_each_has_its_own(model):
    start = SleepCache(fixed_shapes=True)
    model(tokens(1, 2), past_key_values=start)
    model(tokens(1, 1), past_key_values=start)

    def read(seed: int):
        cache = start.clone()
        with torch.no_grad():
            return [model(tokens(1, 1, seed=10 * seed + t), past_key_values=cache).logits for t in range(3)]

    alone = [read(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for seed, logits in enumerate(threads.map(read, range(8))):
            for mine, expected in zip(logits, alone[seed], strict=True):
                assert_close(mine, expected, EXACT, f"reader {seed}")


def test_a_column_is_given_away_once(model):
    cache = SleepCache(fixed_shapes=True)
    for t in range(3):
        model(tokens(1, 1, seed=t), past_key_values=cache)
    before = cache.clone()
    model(tokens(1, 1, seed=3), past_key_values=cache)
    assert cache.memory.arena is before.memory.arena
    model(tokens(1, 1, seed=4), past_key_values=before)
    assert cache.memory.arena is not before.memory.arena
    own = before.memory.arena
    with breaking(model, 2), pytest.raises(Broke):
        model(tokens(1, 1), past_key_values=before)
    assert before.memory.arena is own
    model(tokens(1, 1), past_key_values=before)
    assert before.memory.arena is not own


def test_where_gradient_is_recorded_nothing_is_written_in_place(model):
    cache, usual = SleepCache(fixed_shapes=True), SleepCache()
    for t in range(3):
        for each in (cache, usual):
            model(tokens(1, 1, seed=t), past_key_values=each)
    arena = cache.memory.arena
    filled = [buffer.clone() for buffer in arena.buffers]
    with torch.enable_grad():
        losses = []
        for each in (cache, usual):
            losses += [sum(model(tokens(1, 1, seed=t), past_key_values=each).logits.sum() for t in range(3))]
        gradients = [torch.autograd.grad(loss, model.language_model.model.norm.weight)[0] for loss in losses]
    assert_close(*gradients, EXACT, "gradient")
    assert all(map(torch.equal, arena.buffers, filled))
    model(tokens(1, 1), past_key_values=cache)
    model(tokens(1, 1), past_key_values=usual)
    assert_same_session(cache, usual, "after gradient")


def test_keys_that_are_put_in_the_place_of_others_count(model):
    cache = SleepCache(fixed_shapes=True)
    for t in range(4):
        model(tokens(1, 1, seed=t), past_key_values=cache)
    other, usual = cache.clone(), SleepCache()
    doubled = {i: (2 * keys, 2 * values) for i, (keys, values) in cache.memory.kv.items()}
    other.memory = replace(cache.memory, kv=doubled)
    usual.now = replace(other.now, fixed_shapes=False)
    assert other.memory.arena is None
    logits = [model(tokens(1, 1), past_key_values=each).logits for each in (other, usual, cache)]
    assert_close(logits[0], logits[1], EXACT, "the keys that were put there")
    assert not torch.allclose(logits[0], logits[2])


def test_modes_that_change_between_calls(model):
    def read(cache):
        logits = []
        for t, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad] * 2):
            with mode():
                logits += [model(tokens(1, 1, seed=t), past_key_values=cache).logits]
        return torch.cat(logits)

    assert_close(read(SleepCache(fixed_shapes=True)), read(SleepCache()), EXACT, "inference mode")


def test_precisions_that_change_between_calls():
    model = sleeping(dtype=torch.float32, window_size=9).eval()

    def read(cache):
        logits = []
        for t in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=t // 2 % 2 == 0):
                logits += [model(tokens(1, 1, seed=t), past_key_values=cache).logits.float()]
        return torch.cat(logits)

    # Keys in bfloat16 are those of the same calls; what attention does with them may be rounded elsewhere.
    one, other = read(SleepCache(fixed_shapes=True)), read(SleepCache())
    assert (one - other).norm() < 0.02 * other.norm()


def test_what_leaves_a_session_is_its_own(model, tmp_path):
    """In a file, a pickle or a deep copy there is nothing of what others have read on."""
    cache = SleepCache(fixed_shapes=True)
    for t in range(3):
        model(tokens(1, 1, seed=t), past_key_values=cache)
    other = cache.clone()
    model(tokens(1, 1, seed=3), past_key_values=other)
    cache.save(tmp_path / "cache.safetensors")
    loaded = SleepCache.load(tmp_path / "cache.safetensors")
    for mine in (loaded, pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert_same_session(mine, cache, "brought back")
        for keys, values in mine.memory.kv.values():
            assert keys.untyped_storage().nbytes() == keys.nbytes and values.untyped_storage().nbytes() == values.nbytes
        for each in (mine, ahead := cache.clone()):
            model(tokens(1, 1, seed=9), past_key_values=each)
        assert_same_session(mine, ahead, "read on")
    assert other.kv_bytes == sum(buffer.nbytes for buffer in other.memory.arena.buffers) > 0


def test_transformers_reads_no_token_too_many_in_a_session():
    """On Apple's GPUs it learns one token late that all rows have ended, and takes the last out of caches that it may
    crop: of a session that would be a token that belongs to the text."""
    check = getattr(generation, "DeferredStopCheck", None)
    assert check is None or not check.is_supported(torch.device("mps"), SleepCache(), True, False)


class Written(TorchDispatchMode):
    """Counts operations, and the bytes of every tensor that one makes or writes into, views aside.

    Attributes:
        operations: name of each.
        largest: bytes of the largest tensor made anew.
        bytes: all bytes written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.largest = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.operations.append(func.overloadpacket.__name__)
        for made in tree_leaves(output):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.largest, self.bytes = max(self.largest, made.nbytes), self.bytes + made.nbytes
        if func.overloadpacket is torch.ops.aten.index_copy_:
            self.bytes += args[3].nbytes
        return output


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_no_token_copies_what_is_there(eviction, rows):
    # Before it packed queries, transformers copied the keys that several heads share, once for each of them.
    heads = {} if hasattr(sdpa_attention, "pack_gqa") else {"num_key_value_heads": 4}
    base = tiny_base("qwen3", max_position_embeddings=1000, **heads)
    model = sleeping(base, eviction=eviction, window_size=200, n_loops=1).eval()
    counts = {}
    for fixed in (True, False):
        cache = SleepCache(fixed_shapes=fixed)
        model(tokens(rows, 300), past_key_values=cache, logits_to_keep=1)
        counts[fixed] = []
        for t in range(20):
            with Written() as written:
                model(tokens(rows, 1, seed=t), past_key_values=cache, logits_to_keep=1)
            counts[fixed].append(written)
    one_layer = cache.memory.kv[0][0].nbytes
    # The first token makes room; every other writes as much as every other, and nothing of the size of a layer's keys.
    first, second, *_, last = counts[True]
    assert first.largest > 4 * one_layer and 4 * second.largest < one_layer
    assert second.operations == last.operations and second.bytes == last.bytes
    assert second.operations.count("index_copy_") == 2 * 4
    # Without room every token copies the keys and values of all layers; with it, a mask is made for it.
    assert counts[False][-1].bytes > last.bytes + 8 * 0.8 * one_layer


def test_a_pass_that_a_sleep_shares_is_made_without_room():
    """Windows of one token, beside a row whose window is open: the sleep goes back before its first pass."""
    model = sleeping(window_size=1, eviction="sliding", n_loops=2, loop_range=[0, 3]).eval()
    ids, mask = tokens(2, 5), torch.tensor([[1, 1, 1], [0, 0, 1]])
    read = []
    with torch.no_grad():
        for fixed_shapes in (True, False):
            session = SleepCache(fixed_shapes)
            model(ids[:, :1], past_key_values=session)
            model.sleep(session, rows=[0])
            model(ids[:, 1:4], attention_mask=mask, past_key_values=session)
            read.append(model(ids[:, 4:], past_key_values=session).logits)
    assert torch.equal(*read)
