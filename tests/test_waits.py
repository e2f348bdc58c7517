"""No decoded token waits for the device, and a step of training at most once."""

from __future__ import annotations

import copy

import pytest
import torch
from families import tokens
from far import FarTensor, far_away, send
from small import sleeping
from tolerances import GROWN, assert_close

from sleepify import SleepCache

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
def test_generation_waits_to_learn_which_rows_have_ended(rows, eos, per_token):
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
        counts.append(sum("/sleepify/" in place for _, place in waits.seen))
    assert counts[1] - counts[0] == 5 * per_token


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


def test_what_waits_is_seen():
    with far_away() as waits:
        far = FarTensor(torch.arange(3))
        near = torch.zeros(3, dtype=torch.long)
        for look in (
            lambda: far.sum().item(),
            lambda: bool(far.any()),
            lambda: far.cpu(),
            lambda: far.to("cpu", non_blocking=True),
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
        assert len(waits.seen) == before
