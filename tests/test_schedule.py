"""The schedule: whole numbers without a model, and the calls that a model then makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from small import sleeping

from sleepify.schedule import cost, passes, schedule

IGNORE = -100


@st.composite
def batches(draw):
    window, batch, width = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 14))
    lengths = draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
    opened = draw(st.lists(st.integers(0, window), min_size=batch, max_size=batch))
    wanted = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch))
    return window, opened, lengths, np.array(wanted, dtype=bool)


def replay(window, opened, lengths, wanted, keep, plan):
    """Carries a schedule out token by token, and checks every step; what was read awake, asleep and asked."""
    have, done = list(opened), [0] * len(lengths)
    slept = [0] * len(lengths)
    asked, awake_to = [], {}
    shareable = {}
    for each in plan.rounds:
        assert {row for nap in each.sleeps for row in nap.rows} == {r for r in each.rows if have[r] == window}
        for nap in each.sleeps:
            assert not nap.shares or shareable.get(nap.rows)
            for row in nap.rows:
                assert have[row] == window, "only full windows sleep"
                have[row], slept[row] = 0, slept[row] + 1
        shareable = {}
        for row, start, count in zip(each.rows, each.starts, each.counts, strict=True):
            assert start == done[row] and 1 <= count <= window - have[row] and start + count <= lengths[row]
        taken = dict(zip(each.rows, each.counts, strict=True))
        for wake in each.wakes:
            places = range(len(wake.rows) * max(wake.counts))
            picked = places if wake.picked is None else wake.picked.tolist()
            for place in picked:
                row, offset = wake.rows[place // max(wake.counts)], place % max(wake.counts)
                assert offset < wake.counts[wake.rows.index(row)], "no padding is picked"
                asked.append((row, done[row] + offset))
            for row, count in zip(wake.rows, wake.counts, strict=True):
                assert count <= taken[row]
                assert not keep or count == taken[row], "a session knows its window to the end"
                awake_to[row] = done[row] + count
            if wake.shares:
                assert all(
                    have[row] == 0 and count == window for row, count in zip(wake.rows, wake.counts, strict=True)
                )
                shareable[wake.rows] = True
        for row, count in taken.items():
            have[row] += count
            done[row] += count
    return slept, done, asked, awake_to


@settings(max_examples=300)
@given(batches(), st.booleans(), st.booleans(), st.booleans())
def test_every_wanted_token_is_read_awake_once_and_nothing_else_is_done(batch, keep, mixes, may_share):
    window, opened, lengths, wanted = batch
    plan = schedule(opened, lengths, wanted, window, keep=keep, mixes_lengths=mixes, may_share=may_share)
    slept, done, asked, awake_to = replay(window, opened, lengths, wanted, keep, plan)
    real = [[c for c in range(length) if wanted[row, c]] for row, length in enumerate(lengths)]
    assert asked == list(zip(plan.rows.tolist(), plan.columns.tolist(), strict=True))
    assert sorted(asked) == [(row, c) for row, columns in enumerate(real) for c in columns]
    for row, length in enumerate(lengths):
        end = length if keep else max(real[row], default=-1) + 1
        assert done[row] == end, "a row ends at its last wanted token"
        # Whenever a full window is followed by a token that is read.
        assert slept[row] == (max(0, opened[row] + end - 1) // window if end else 0)
        assert not (keep and length) or awake_to[row] == length


@settings(max_examples=200)
@given(batches(), st.integers(1, 3))
def test_gradient_flows_through_the_last_sleeps_of_every_row(batch, kept):
    window, opened, lengths, wanted = batch
    plan = schedule(opened, lengths, wanted, window, keep=False, backprop_windows=kept)
    flags = {}
    for each in plan.rounds:
        for nap in each.sleeps:
            for row in nap.rows:
                flags.setdefault(row, []).append(nap.gradient)
    for row, gradient in flags.items():
        assert gradient == [len(gradient) - n <= kept for n in range(len(gradient))], row


@settings(max_examples=200)
@given(batches(), st.booleans())
def test_all_tokens_wanted_is_every_token_wanted(batch, keep):
    window, opened, lengths, wanted = batch
    one, other = (schedule(opened, lengths, w, window, keep=keep) for w in (None, np.ones_like(wanted)))
    assert one.rows.tolist() == other.rows.tolist() and one.columns.tolist() == other.columns.tolist()
    assert str(one.rounds) == str(other.rounds)


def test_passes_run_what_is_read_and_nothing_else():
    whole = passes(3, (1, 3), last_writer=4)
    assert (whole.prelude, whole.coda) == ((0, 1), (3, 4))
    assert [(each.start, each.stop, each.is_last) for each in whole.loops] == [
        (1, 3, False),
        (1, 3, False),
        (1, 3, True),
    ]
    assert whole.layer_calls == 1 + 3 * 2 + 1
    pruned = passes(2, (0, 4), last_writer=2, backprop_loops=1)
    assert [(each.stop, each.gradient) for each in pruned.loops] == [(4, False), (2, True)]
    assert pruned.coda == (4, 4)
    assert passes(2, (2, 4), last_writer=1).layer_calls == 1 + 2  # the last pass and the rest write nothing


def test_cost_counts_layers_times_tokens():
    inside = passes(3, (0, 4), last_writer=4)
    asked = np.zeros((1, 9), dtype=bool)
    asked[0, 8] = True
    rounds = schedule([0], [9], asked, 4, keep=False).rounds
    assert cost(rounds, 4, inside, 4) == 2 * 4 * 12 + 1 * 4
    shared = schedule([0], [8], None, 4, keep=False, may_share=True).rounds
    assert cost(shared, 4, inside, 4) == 8 * 4 + 4 * (12 - 4)


# --- the calls of a model


def layer_calls(model, layer=0):
    calls = []
    hook = model.language_model.model.layers[layer].register_forward_hook(lambda *_: calls.append(1))
    return calls, hook


@pytest.mark.parametrize(
    "columns, length, expected",
    [
        ([1, 2], 25, 1),  # labels only in the first of five windows: one wake pass
        (range(21), 21, 4 + 3 * 2),  # fully supervised, T = 4 L + 1: three sleeps, of three passes, one of them shared
        ([24], 25, 4 * 3 + 1),  # labels at the end: every window before is slept on
        ([], 25, 0),
    ],
)
def test_sleeps_and_passes_that_nobody_reads_are_not_made(columns, length, expected):
    model = sleeping(window_size=5, n_loops=3).train()
    ids = tokens(1, length)
    labels = torch.full_like(ids, IGNORE)
    labels[:, list(columns)] = ids[:, list(columns)]
    calls, _ = layer_calls(model)
    model(ids, labels=labels)
    assert len(calls) == expected


def test_a_wake_pass_ends_at_the_last_token_that_is_asked_of():
    model = sleeping(window_size=6, n_loops=2).train()
    widths = []
    model.language_model.model.layers[3].register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    ids = tokens(2, 11)
    labels = torch.full_like(ids, IGNORE)
    labels[0, 3] = ids[
        0, 3
    ]  # predicted by token 2 of the first window; that is not slept on by row 1, which ends there
    model(ids, labels=labels)
    assert widths == [3]
