"""Where layers are sharded, the loss is made in pieces, and the head called as often on every rank."""

from __future__ import annotations

import pytest
import torch
from families import tokens, true_float64
from small import trainable
from tolerances import EXACT_GRAD, assert_close

from sleepify import loss as losses
from sleepify.training import rounds


def gradients(model, batch):
    """Gradients of a step, how often the head was called in it, and the most places at a time."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    model.zero_grad()
    model(**batch).loss.backward()
    hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(seen), max(seen)


@pytest.fixture(autouse=True)
def exactly():
    """Rows that are added change the shapes, and so the rounding of what transformers takes in float32."""
    with true_float64():
        yield


@pytest.mark.parametrize("labels_elsewhere", [3, 21])
def test_the_head_is_called_as_often_as_the_rank_with_most_labels_needs(monkeypatch, labels_elsewhere):
    ids = tokens(2, 20)
    labels = ids.masked_fill(torch.arange(20) < 15, -100)
    model = trainable(dtype=torch.float64).train()
    expected, _, most = gradients(model, {"input_ids": ids, "labels": labels})
    assert most == 10
    monkeypatch.setattr(losses, "PIECE", 4)
    monkeypatch.setattr(
        rounds.dist,
        "all_reduce",
        lambda t, op: t.copy_(torch.tensor([3, max(10, labels_elsewhere)])) if t.dtype == torch.long else t,
    )
    batch = rounds.equalise({"input_ids": ids, "labels": labels}, 8, apart=False)
    actual, n_calls, most = gradients(model, batch)
    # Labels, and a place more per round and row that the ranks may add, each piece once more in the backward pass.
    assert n_calls == 2 * -(-(max(10, labels_elsewhere) + 6) // 4) and most <= 4
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, EXACT_GRAD, name)


def test_a_number_of_pieces_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected loss_pieces to be a whole number of at least 1, got 0"):
        trainable()(tokens(1, 9), labels=tokens(1, 9), loss_pieces=0)
