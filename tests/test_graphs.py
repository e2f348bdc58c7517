"""One graph for the wake token of all sessions.

Without a GPU a tape stands in for it: what it has recorded it does again, on the tensors that were there, so that
whatever was a number of Python's is what it was at the recording.
"""

from __future__ import annotations

import copy

import pytest
import talking
import torch
from families import tiny_base, tokens, true_float64
from far import FarTensor, far_away, send
from small import sleeping
from test_contract import assert_same_session
from tolerances import DEVICE32, EXACT, GROWN, assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sleepify import Session, SleepCache, UnsupportedModelError

_ATEN = torch.ops.aten


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in.

    Attributes:
        made: how many tapes were recorded.
        played: how often one was.
    """

    made = played = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.lift_fresh.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output

    @classmethod
    def capture(cls, function):
        cls.made += 1
        tape = cls()
        with tape:
            function()

        def replay():
            cls.played += 1
            for func, args, kwargs, outputs in tape.calls:
                again = tree_leaves(func(*args, **kwargs))
                for old, new in zip(tree_leaves(outputs), again, strict=True):
                    if isinstance(old, torch.Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)

        return replay


@pytest.fixture(autouse=True)
def exactly():
    Tape.made = Tape.played = 0
    with true_float64(), torch.no_grad():
        yield


def read(model, ids, cache, mask=None):
    return model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "falcon_h1", "ouro", "jet_nemotron"])
def test_replayed_tokens_are_those_that_are_read(family, eviction):
    """Through sleeps, in rows whose windows fill at different steps."""
    model = sleeping(family, eviction=eviction, window_size=6, n_loops=2).eval()
    ids, mask = tokens(2, 20), torch.tensor([[1, 1, 1], [0, 1, 1]])

    def run(cache):
        pieces = [read(model, ids[:, :3], cache, mask)]
        return torch.cat([*pieces, *(read(model, ids[:, t : t + 1], cache) for t in range(3, 20))], 1), cache

    expected, eager = run(SleepCache(fixed_shapes=True))
    with model.captured(Tape.capture):
        logits, graphed = run(SleepCache(fixed_shapes=True))
    assert_close(logits, expected, EXACT, "logits")
    assert_same_session(graphed, eager, family)
    # The first token of a window has no keys to write behind where all rows' windows begin; here rows' never do.
    assert Tape.made == 1 and Tape.played >= 16


def test_one_graph_serves_all_sessions(monkeypatch):
    """In turn, forked, taken back, after a failed call: none sees what another has left in the graph's tensors."""
    model = sleeping(window_size=9).eval()
    usual = {name: SleepCache() for name in "abc"}
    fixed = {name: SleepCache(fixed_shapes=True) for name in "abc"}

    def both(name, ids):
        expected = read(model, ids, usual[name])
        assert_close(read(model, ids, fixed[name]), expected, EXACT, f"session {name}: {usual[name]}")

    with model.captured(Tape.capture):
        for seed, name in enumerate("abc"):
            both(name, tokens(1, 2 + seed, seed=seed))
        for t, name in enumerate("aaabbacabbbccca"):
            both(name, tokens(1, 1, seed=t))
        assert Tape.made == 1 and Tape.played > 10
        for caches in (usual, fixed):
            caches["d"] = caches["a"].clone()
        for t, name in enumerate("adadda"):
            both(name, tokens(1, 1, seed=20 + t))
        for caches in (usual, fixed):
            caches["b"].rewind(2)
            model.sleep(caches["c"])
        for t, name in enumerate("bcbbcc"):
            both(name, tokens(1, 1, seed=30 + t))
        # The token has been read when something breaks, and is read again.
        monkeypatch.setattr(model.blocks, "logits", _breaks)
        with pytest.raises(KeyError):
            read(model, tokens(1, 1), fixed["a"])
        monkeypatch.undo()
        for t, name in enumerate("aabac"):
            both(name, tokens(1, 1, seed=40 + t))
    assert Tape.made == 1
    for name in usual:
        assert_same_session(fixed[name], usual[name], name)


def _breaks(_):
    raise KeyError


def test_a_graph_for_each_batch_and_room_and_no_more_than_some(monkeypatch):
    monkeypatch.setattr("sleepify.graphs._MOST", 2)
    model = sleeping(window_size=9).eval()
    with model.captured(Tape.capture):
        for rows in (1, 2, 3, 1):
            cache, usual = SleepCache(fixed_shapes=True), SleepCache()
            for t in range(4):
                expected = read(model, tokens(rows, 1, seed=t), usual)
                assert_close(read(model, tokens(rows, 1, seed=t), cache), expected, EXACT, f"{rows} rows")
            assert len(model._graphs) <= 2
        # The graph for one row was given up for that of three.
        assert Tape.made == 4
    assert model._graphs is None


def test_a_token_that_goes_on_copies_one_column_and_the_state():
    base = tiny_base("qwen3", max_position_embeddings=1000)
    model = sleeping(base, window_size=400, n_loops=1).eval()
    cache = SleepCache(fixed_shapes=True)

    class Copied(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.sizes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if func in (_ATEN.copy_.default, _ATEN.clone.default):
                self.sizes.append(output.nbytes)
            return output

    with model.captured(lambda function: lambda: None):
        read(model, tokens(1, 300), cache)
        read(model, tokens(1, 1), cache)
        with Copied() as copied:
            read(model, tokens(1, 1), cache)
    arena = cache.memory.arena
    state = [tensor.nbytes for layer in cache.memory.state.values() for tensor in layer]
    columns = [buffer.nbytes // arena.columns for buffer in arena.buffers]
    few = [8, 3 * 8, 32 * 8]
    assert sorted(copied.sizes) == sorted([*state, *columns, *few]) and arena.columns == 400


def test_generation_with_graphs():
    model = sleeping(window_size=6).eval()
    ids, mask = tokens(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    expected = model.generate(ids, **how)
    with model.captured(Tape.capture):
        assert torch.equal(model.generate(ids, cache_implementation="static", **how), expected)
    assert Tape.made == 1 and Tape.played > 8


def test_sessions_answer_with_graphs():
    """Text in, text out; one that was forked, and both in turn, with one graph."""
    model, words = talking.talker(), talking.tokenizer()
    how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}

    def talk(fixed):
        session = Session(model, words)
        session.cache = SleepCache(fixed_shapes=fixed)
        session.read("a cab had a bed, dad fed a hag.")
        other = session.fork()
        asked = [(session, "who?"), (other, "egg"), (session, "a cab?")]
        return [each.ask(text, keep=True, **how) for each, text in asked]

    expected = talk(False)
    with model.captured(Tape.capture):
        assert talk(True) == expected
    assert Tape.made == 1 and Tape.played > 12


def test_nothing_is_replayed_where_it_would_not_be_right():
    """In training, under autocast, with gradient, for many tokens, for sessions whose shapes are not fixed."""
    model = sleeping(dtype=torch.float32, window_size=9).eval()
    with model.captured(Tape.capture):
        for setting in (model.train, lambda: torch.autocast("cpu"), torch.enable_grad, None):
            cache = SleepCache(fixed_shapes=setting is not None)
            context = setting() if setting is not None else torch.no_grad()
            if context is model:
                for t in range(4):
                    read(model, tokens(1, 1, seed=t), cache)
                model.eval()
            else:
                with context:
                    for t in range(4):
                        read(model, tokens(1, 1, seed=t), cache)
        cache = SleepCache(fixed_shapes=True)
        for _ in range(3):
            read(model, tokens(1, 2), cache)
    assert Tape.made == 0


def test_inference_mode_comes_and_goes():
    model = sleeping(window_size=9).eval()
    cache, usual = SleepCache(fixed_shapes=True), SleepCache()
    with model.captured(Tape.capture):
        for t, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad] * 2):
            with mode():
                one, other = (read(model, tokens(1, 1, seed=t), each) for each in (cache, usual))
                assert_close(one, other, EXACT, f"token {t}")


def test_what_cannot_be_captured_is_refused():
    model = sleeping("qwen3_moe", window_size=9).eval()
    cache = SleepCache(fixed_shapes=True)
    read(model, tokens(1, 2), cache)
    before = cache.now
    with model.captured(Tape.capture), pytest.raises(UnsupportedModelError, match="captured"):
        read(model, tokens(1, 1), cache)
    assert cache.now is before
    with pytest.raises(ValueError, match="CUDA device"), model.captured():
        pass
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"), model.captured(Tape.capture):
        pass


def test_no_token_waits_for_the_device():
    model, ids = sleeping(window_size=6).eval(), tokens(2, 16)
    usual = SleepCache()
    expected = [read(model, ids[:, t : t + 1], usual) for t in range(16)]
    with far_away() as waits:
        sent = send(copy.deepcopy(model))
        cache = SleepCache(fixed_shapes=True)

        def capture(function):
            return function

        with sent.captured(capture):
            for t in range(16):
                logits = read(sent, FarTensor(ids)[:, t : t + 1], cache)
                assert_close(logits.near, expected[t], GROWN, f"token {t}")
    assert waits.seen == []


@pytest.mark.gpu
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["qwen3", "falcon_h1", "ouro", "jet_nemotron"])
def test_cuda_graphs_and_eager_agree(family, eviction):
    """Two sessions in turn, through sleeps, and each on its own."""
    model = sleeping(family, torch.float32, eviction=eviction, window_size=16, n_loops=2).cuda().eval()
    ids = tokens(2, 60).cuda()
    eager = [[read(model, ids[row, t][None, None], cache) for t in range(60)] for row, cache in _two()]
    with model.captured():
        caches = [cache for _, cache in _two()]
        graphed = [[read(model, ids[row, t][None, None], caches[row]) for row in (0, 1)] for t in range(60)]
        assert len(model._graphs) == 1
    for t, logits in enumerate(graphed):
        for row in (0, 1):
            assert_close(logits[row], eager[row][t], DEVICE32, f"row {row}, token {t}")


def _two():
    return [(row, SleepCache(fixed_shapes=True)) for row in (0, 1)]
