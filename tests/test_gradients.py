"""Gradients through windows and loops: exact, whole, and the same however activations are kept."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import small
import torch
from families import tiny_base, tokens, true_float64
from reference import IGNORE, loss_of, read_row
from tolerances import EXACT_GRAD, QUOTIENT, assert_close

from sleepify import FastWeightConfig, SleepCache, sleepify
from sleepify.memory import Memory
from sleepify.settings import Settings


@pytest.fixture(autouse=True, scope="module")
def exactly():
    """Sums come in another order where passes are shared, batched or split; float32 inside would round them apart."""
    with true_float64():
        yield


def sleeping(eviction: str = "hard", family: str = "qwen3", **keywords):
    return small.sleeping(family, eviction=eviction, **({"window_size": 4} | keywords)).train()


def batch():
    """Two rows of 11 and 14 tokens, supervised in the middle and at the end."""
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    ids[0, 11:], mask[0, 11:] = 0, 0
    labels = torch.full_like(ids, IGNORE)
    labels[0, 9:11], labels[1, 5], labels[1, 12:] = ids[0, 9:11], ids[1, 5], ids[1, 12:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, EXACT_GRAD, name)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("rule", ["gdn", "jet", "mamba2"])
def test_every_gradient_is_that_of_the_reference(eviction, rule):
    model = sleeping(eviction, fast_weights=FastWeightConfig(rule=rule, layers=[0, 2]))
    inputs = batch()
    actual = gradients(model, model(**inputs).loss)
    rows = [(inputs["input_ids"][0, :11], inputs["labels"][0, :11]), (inputs["input_ids"][1], inputs["labels"][1])]
    totals, counts = zip(*(loss_of(read_row(model, ids), labels) for ids, labels in rows), strict=True)
    assert_same_gradients(actual, gradients(model, sum(totals) / sum(counts)))


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", ["qwen3", "jet_nemotron"])
@pytest.mark.parametrize("mode", ["window", "loop"])
def test_checkpointing_changes_no_gradient(eviction, family, mode):
    keywords = {} if family == "qwen3" else {"fast_weights": None}
    model = sleeping(eviction, family, **keywords)
    expected = gradients(model, model(**batch()).loss)
    model.config.checkpoint = mode
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same_gradients(gradients(model, model(**batch()).loss), expected)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_boundaries_kept_on_the_cpu_change_no_gradient(eviction):
    model = sleeping(eviction, checkpoint="window")
    expected = gradients(model, model(**batch()).loss)
    model.config.offload = True
    moved = []
    to = Memory.map
    with patch.object(Memory, "map", lambda self, function: moved.append(len(self.tensors())) or to(self, function)):
        loss = model(**batch()).loss
    assert sum(moved) > 0
    assert_same_gradients(gradients(model, loss), expected)


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("loop_range", [(0, 4), (1, 3), (0, 1)])
def test_a_wake_pass_that_serves_as_first_pass_of_a_sleep_changes_nothing(eviction, loop_range):
    model = sleeping(eviction, loop_range=loop_range)
    ids = tokens(2, 14)
    calls = []
    hook = model.language_model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    shared = gradients(model, model(ids, labels=ids).loss)
    n_shared = len(calls)
    with patch.object(Settings, "may_share", False):
        alone = gradients(model, model(ids, labels=ids).loss)
    hook.remove()
    # Three windows of the four are slept on, each of which saves one pass.
    assert len(calls) - n_shared == n_shared + 3
    assert_same_gradients(shared, alone)


def test_checkpointing_per_window_keeps_only_what_crosses_boundaries():
    def kept(mode):
        model = sleeping(n_loops=4, checkpoint=mode)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens(1, 41), labels=tokens(1, 41).masked_fill(torch.arange(41) < 40, IGNORE)).loss  # noqa: B018
        return sum(sizes)

    none, loop, window = kept("none"), kept("loop"), kept("window")
    assert window < loop < none / 5


@pytest.mark.parametrize("rule", ["gdn", "jet", "mamba2"])
def test_gradcheck_through_three_windows_and_three_loops(rule):
    inserted = FastWeightConfig(rule=rule, layers=[1])
    model = sleeping("sliding", n_loops=3, window_size=2, loop_range=(1, 3), fast_weights=inserted)
    ids = tokens(1, 7)
    parameters = {
        name: p for name, p in model.named_parameters() if name.startswith("fast_weights") or "layers.2" in name
    }

    def logits_after_three_sleeps(*values):
        cache = SleepCache()
        replaced = dict(zip(parameters, values, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(model, replaced):
            model(ids[:, :6], past_key_values=cache)
            model.sleep(cache)
            assert cache.windows == [3]
            return model(ids[:, 6:], past_key_values=cache).logits.square().mean()

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(logits_after_three_sleeps, values, fast_mode=True)


def test_truncated_backpropagation_through_loops():
    model = sleeping(window_size=6, n_loops=3, backprop_loops=1)
    ids = tokens(1, 8)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = ids[:, -1]
    actual = gradients(model, model(ids, labels=labels).loss)
    # By hand: the last pass starts from constants.
    blocks, options = model.blocks, model.options()
    from sleepify.snapshot import Window

    window, empty = Window(ids[:, :6], (6,), (0,)), Memory(1)
    with torch.no_grad():
        hidden, frame = blocks.open(window.input_ids, window.lengths, window.positions, empty, False)
        now = empty
        for _ in range(2):
            now = now.reenter(empty, 0, 4)
            hidden, now = blocks.run(hidden, now, frame, 0, 4)
    hidden, now = blocks.run(hidden, now.reenter(empty, 0, 4), frame, 0, 3)
    after = now.last_keys(0)
    tail, frame = blocks.open(ids[:, 6:], (2,), (0,), after, False)
    tail, _ = blocks.run(tail, after, frame, 0, 4)
    loss = torch.nn.functional.cross_entropy(blocks.logits(tail)[:, 0], ids[:, 7])
    assert options.backprop_loops == 1
    assert_same_gradients(actual, gradients(model, loss))
    model.config.backprop_loops = 3
    every = gradients(model, model(ids, labels=labels).loss)
    model.config.backprop_loops = None
    assert_same_gradients(every, gradients(model, model(ids, labels=labels).loss))


@pytest.mark.parametrize("kept", [1, 2])
def test_truncated_backpropagation_through_windows(kept):
    model = sleeping(window_size=3, backprop_windows=kept)
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0  # rows of 9 and 13 tokens, the last of which predicts nothing: 2 and 3 sleeps
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = ids[:, -1]
    actual = gradients(model, model(ids, attention_mask=mask, labels=labels).loss)
    total = 0
    for row, begin, sleeps in ((0, 4, 2), (1, 0, 3)):
        trace = read_row(model, ids[row, begin:], detach_before=sleeps - kept)
        total = total + loss_of(trace, labels[row, begin:])[0]
    assert_same_gradients(actual, gradients(model, total / 2))


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "zamba2", "falcon_h1"])
def test_gradient_crosses_windows_through_the_recurrent_layers_of_transformers(family):
    """Against a difference quotient: a state that is copied in place or detached somewhere would show."""
    model = sleepify(tiny_base(family), n_loops=2, window_size=4).train()
    ids = tokens(1, 11)
    labels = torch.full_like(ids, IGNORE)
    labels[:, -1] = ids[:, -1]
    weight = model.get_input_embeddings().weight
    first = torch.zeros_like(weight)
    first[ids[0, :4]] = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).double()
    first[ids[0, 4:]] = 0  # tokens that only the first window has
    assert first.count_nonzero() > 0
    model(ids, labels=labels).loss.backward()
    slope, step = (weight.grad * first).sum(), 1e-7
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * step * first
            ends.append(model(ids, labels=labels).loss)
            weight -= sign * step * first
    assert_close(slope, (ends[0] - ends[1]) / (2 * step), QUOTIENT, family)
    assert slope.abs() > 1e-4


@pytest.mark.parametrize("level", ["window", "loop"])
@pytest.mark.parametrize("offload", [False, True])
def test_recomputation_is_shown_the_tensors_whose_device_has_random_state(level, offload):
    """torch keeps the generators of the devices on which it sees tensors; dropout must be the same the second time."""
    model = sleeping(checkpoint=level, offload=offload)
    seen = []
    infer = torch.utils.checkpoint._infer_device_type

    def note(*arguments):
        leaves = torch.utils._pytree.tree_leaves(arguments)
        seen.append([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        return infer(*arguments)

    with patch.object(torch.utils.checkpoint, "_infer_device_type", note):
        model(**batch()).loss.backward()
    assert len(seen) > 4 and all(tensors for tensors in seen)


def test_trainers_are_told_that_activations_are_recomputed():
    """transformers before and from 5.23 ask by different names; without an answer DDP looks for unused parameters."""
    model = sleeping()
    for asked in (True, False):
        model.gradient_checkpointing_enable() if asked else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing is model.is_activation_checkpointing is asked


def test_what_no_pass_uses_is_left_out_of_training_and_comes_back():
    """DDP does not look for unused parameters then: one that never has a gradient would be an error."""
    base = tiny_base("ouro")
    model = sleepify(base, n_loops=2, window_size=4)
    model.freeze_base(False)
    loss = model.train()(tokens(2, 11), labels=tokens(2, 11)).loss
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [] and not base.model.early_exit_gate.weight.requires_grad
    assert all(p.requires_grad for p in model.unload().parameters())
