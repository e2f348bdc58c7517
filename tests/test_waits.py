"""No decoded token waits for the device, and a step of training at most once."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tokens
from far import FarTensor, far_away, send
from small import sleeping
from tolerances import GROWN, assert_close
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sleepify import SleepCache
from sleepify.ended import Ended
from sleepify.serving.sampling import Sampling, choose
from sleepify.training.norms import not_finite

FAMILIES = ["qwen3", "jet_nemotron", "falcon_h1"]


@pytest.mark.parametrize(("family", "eviction"), [*((name, "hard") for name in FAMILIES), ("qwen3", "sliding")])
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("first", [(1,), (2, 5)], ids=["one row", "rows whose windows fill at different steps"])
def test_a_decoded_token_waits_for_nothing(family, eviction, fixed_shapes, first):
    model = sleeping(family, eviction=eviction, n_loops=2, window_size=3).eval()
    ids, n_tokens = tokens(len(first), 12), 7
    mask = torch.arange(5) >= 5 - torch.tensor(first)[:, None]

    def read(ids, mask, cache, begin=list):
        model(ids[:, :5], attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        begin()
        return [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 5 + n_tokens)]

    cache = SleepCache(fixed_shapes)
    with torch.no_grad():
        expected = read(ids, mask, SleepCache(fixed_shapes))
    with far_away() as waits, torch.no_grad():
        send(model)
        logits = read(FarTensor(ids), FarTensor(mask), cache, begin=waits.seen.clear)
    assert max(cache.windows) > 1 and waits.seen == []
    for t, (far, near) in enumerate(zip(logits, expected, strict=True)):
        assert_close(far.near, near, GROWN, f"token {t}")


@pytest.mark.parametrize(
    ("rows", "eos", "per_token"), [(1, 5, 0), (2, None, 0), (2, 5, 1)], ids=["one row", "a limit", "rows may end"]
)
def test_generation_waits_to_learn_which_of_several_rows_have_ended(rows, eos, per_token):
    """Whoever looks, we or transformers' loop; it is told of one row while the device goes on."""
    model = sleeping().eval()
    ids, mask = tokens(rows, 7), torch.ones(rows, 7, dtype=torch.long)
    mask[0, :3] = 0
    counts = []
    for n_tokens in (2, 7):
        how = {"min_new_tokens": n_tokens, "max_new_tokens": n_tokens, "eos_token_id": eos, "pad_token_id": 0}
        with far_away() as waits:
            sent = send(copy.deepcopy(model))
            made = sent.generate(FarTensor(ids), attention_mask=FarTensor(mask), past_key_values=SleepCache(), **how)
        assert made.near.tolist() == model.generate(ids, attention_mask=mask, **how).tolist()
        counts.append(len(waits.seen))
    assert counts[1] - counts[0] == 5 * per_token


@pytest.mark.parametrize("first", [3, 5, 8], ids=["within a window", "at its end", "in another"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_token_too_many_leaves_no_trace(first, use_cache):
    """A row that a token ends is known to have ended one token late."""
    model = sleeping().eval()
    ids = tokens(1, 2)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    how |= {"output_scores": True, "output_logits": True}
    made = model.generate(ids, eos_token_id=None, **how).sequences[0, 2:].tolist()
    eos = made[first]
    place = made.index(eos)

    def run(model, ids):
        caches = {"past_key_values": SleepCache()} if use_cache else {"use_cache": False}
        read = []
        model.register_forward_pre_hook(lambda *_: read.append(1))
        return model.generate(ids, eos_token_id=eos, **how, **caches), caches.get("past_key_values"), len(read)

    near, session, n_read = run(copy.deepcopy(model), ids)
    with far_away():
        far, sent, n_sent = run(send(copy.deepcopy(model)), FarTensor(ids))
        assert near.sequences[0, 2:].tolist() == far.sequences.near[0, 2:].tolist() == made[: place + 1]
        for name in ("scores", "logits"):
            assert len(far[name]) == len(near[name]) == place + 1
            assert_close(far[name][-1].near, near[name][-1], GROWN, name)
    assert n_sent == n_read + 1
    if use_cache:
        assert [ids.near.tolist() for ids in sent.now.pending] == session.pending == [[eos]]
        for name in ("seen", "windows", "open_lengths"):
            assert getattr(sent, name) == getattr(session, name)
        assert sent.get_seq_length() == session.get_seq_length()


def test_who_would_notice_a_token_too_many_waits_for_none():
    """A streamer, a watcher, criteria of one's own."""
    model, ids = sleeping().eval(), tokens(1, 4)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    eos = int(model.generate(ids, eos_token_id=None, **how)[0, -3])

    class Streamer(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value)

        def end(self):
            pass

    class Never(StoppingCriteria):
        asked = 0

        def __call__(self, input_ids, scores, **_):
            Never.asked += 1
            return input_ids[:, -1] == -1

    streamer = Streamer()
    for keywords, watch in (({"streamer": streamer}, None), ({"stopping_criteria": [Never()]}, None), ({}, print)):
        with far_away():
            sent = send(copy.deepcopy(model))
            sent.watch = watch
            read = []
            sent.register_forward_pre_hook(lambda *_, read=read: read.append(1))
            made = sent.generate(FarTensor(ids), eos_token_id=eos, **how, **keywords)
            n_made = made.shape[1] - ids.shape[1]
            assert int(made.near[0, -1]) == eos and len(read) == n_made
    assert len(streamer.got) == 1 + n_made and Never.asked == n_made


@pytest.mark.parametrize("checkpoint", ["none", "loop", "window"])
def test_a_step_of_training_waits_once(checkpoint):
    model = sleeping(checkpoint=checkpoint).train()
    ids = tokens(3, 17)
    mask = torch.arange(17) < torch.tensor([17, 11, 6])[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, ::4] = -100
    expected = model(ids, attention_mask=mask, labels=labels).loss
    with far_away() as waits:
        send(model)
        loss = model(FarTensor(ids), attention_mask=FarTensor(mask), labels=FarTensor(labels)).loss
        loss.backward()
        assert_close(loss.detach().near, expected.detach(), GROWN)
    assert [place.split()[-1] for _, place in waits.seen] == ["_fetch"]


@pytest.mark.parametrize("loss_is_bad", [False, True])
@pytest.mark.parametrize("norm", [1.5, float("nan"), float("inf")])
def test_whether_a_step_may_be_made_is_one_look(norm, loss_is_bad):
    expected = loss_is_bad or norm != 1.5
    with far_away() as waits:
        flag = FarTensor(torch.tensor(loss_is_bad))
        assert not_finite(flag, FarTensor(torch.tensor(norm))) == expected and len(waits.seen) == 1
    # DeepSpeed's norm is a number, and a base that is spread over devices has its own elsewhere.
    for other in (norm, torch.tensor(norm, dtype=torch.float64)):
        assert not_finite(torch.tensor(loss_is_bad), other) == expected


def test_what_waits_is_seen():
    with far_away() as waits:
        far = FarTensor(torch.arange(3))
        near = torch.zeros(3, dtype=torch.long)
        for look in (
            lambda: far.sum().item(),
            lambda: bool(far.any()),
            lambda: far.cpu(),
            lambda: bool(far.sum().to("cpu", non_blocking=True)),
            lambda: far.tolist(),
            lambda: far[far > 1],
            lambda: far.nonzero(),
            lambda: near.copy_(far),
            lambda: far.copy_(near),
            lambda: near.to(far.device),
            lambda: torch.tensor([1], device=far.device),
            lambda: torch.equal(far, far),
        ):
            before = len(waits.seen)
            look()
            assert len(waits.seen) > before
        before = len(waits.seen)
        far + near.to(far.device, non_blocking=True)
        copied = far.to("cpu", non_blocking=True)
        torch.get_device_module(far.device).current_stream(far.device).record_event().synchronize()
        assert copied.tolist() == [0, 1, 2] and len(waits.seen) == before


@pytest.mark.parametrize(("temperatures", "n_waits"), [((0, 0, 0), 1), ((0, 1, 0.5), 2)], ids=["likeliest", "drawn"])
def test_the_server_waits_for_the_tokens_of_all_rows_at_once(temperatures, n_waits):
    """It must have them, to say them and to see what ends an answer; reading them waits for nothing."""
    model = sleeping().eval()
    asked = [Sampling(temperature=each, seed=row) for row, each in enumerate(temperatures)]
    ids = tokens(3, 12)

    def run(model, ids):
        cache, chosen = SleepCache(), []
        mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
        generators = [each.generator() for each in asked]
        for t in range(3, 12):
            scores = model(ids[:, 0 if t == 3 else t - 1 : t], attention_mask=mask, past_key_values=cache).logits[:, -1]
            mask = None
            chosen.append(choose(scores, asked, generators))
        return chosen

    with torch.no_grad():
        expected = run(model, ids)
    with far_away() as waits, torch.no_grad():
        assert run(send(model), FarTensor(ids)) == expected
    assert len(waits.seen) == 9 * n_waits


def test_a_loop_may_ask_anything_of_the_rows_that_go_on():
    ended = Ended(StoppingCriteriaList([MaxLengthCriteria(3)]))
    going = torch.ones(2, dtype=torch.long) & ~ended(torch.zeros(2, 2, dtype=torch.long), None)
    assert going.max() == 1 and going.any() and going.shape == (2,) and going.sum().item() == 2
    gone = torch.ones(2, dtype=torch.long) & ~ended(torch.zeros(2, 3, dtype=torch.long), None)
    assert gone.max() == 0 and not gone.any()
    assert torch.equal(torch.full((2,), 5) * gone + 7 * (1 - gone), torch.full((2,), 7))
