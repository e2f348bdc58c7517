"""The host room: gradient through single tokens, what attention is told, what stays as it was, what `verify` sees."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from families import FAMILIES, randomise, tiny_base, tokens, true_float64
from tolerances import EXACT, EXACT_GRAD, FLOAT32, QUOTIENT, assert_close
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from sleepify import SleepCache, UnsupportedModelError, sleepify
from sleepify.hosts import Host, WindowCache, host_class, verify
from sleepify.hosts.narrowing import Narrowing
from sleepify.memory import LayerState, Memory


def sleeping(family, **keywords):
    model = sleepify(tiny_base(family), **({"n_loops": 2, "window_size": 4} | keywords))
    randomise(model.fast_weights)
    return model


def walk(host, ids, pieces):
    """Hidden states [B, T, D] of a text read in pieces, and the memory after it."""
    memory, hidden = Memory(ids.shape[0]), []
    for piece in ids.split(pieces, dim=1):
        lengths = (piece.shape[1],) * ids.shape[0]
        states, frame = host.open(piece, lengths, memory.kv_lengths, memory, keep_keys=True)
        states, memory = host.run(states, memory, frame, 0, host.n_layers)
        memory = memory.advance(lengths, piece.shape[1])
        hidden.append(states)
    return torch.cat(hidden, 1), memory


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- gradient through single tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_token_by_token_is_that_of_the_whole(family):
    """Layers of transformers overwrite their state when they read one token, and need the old one to go back."""
    model, ids = sleeping(family), tokens(2, 5)
    gradients = {}
    for name, pieces in {"whole": [5], "token by token": [1, 1, 1, 1, 1], "mixed": [3, 1, 1]}.items():
        model.zero_grad()
        with true_float64():
            hidden, memory = walk(model.blocks, ids, pieces)
            loss = (hidden * draw(*hidden.shape)).sum()
            for place, (_, layer) in enumerate(sorted(memory.state.items())):
                loss = loss + (layer.recurrent * draw(*layer.recurrent.shape, seed=place)).sum()
            loss.backward()
        gradients[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients["whole"].values())
    for name in ("token by token", "mixed"):
        assert gradients[name].keys() == gradients["whole"].keys()
        for parameter, gradient in gradients["whole"].items():
            assert_close(gradients[name][parameter], gradient, EXACT_GRAD, f"{name}: {parameter}")


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_through_a_window_of_one_token(family):
    """One token behind a full window, windows of one token, all read awake, and pieces of one token."""
    model = sleeping(family)
    ids = tokens(2, 5)
    for length, keywords in ((4, {}), (1, {}), (4, {"awake": torch.ones_like(ids, dtype=torch.bool)})):
        model.config.window_size = length
        model.zero_grad()
        loss = model(ids, labels=ids, logits_to_keep=0, **keywords).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.config.window_size = 4
    cache, losses = SleepCache(), []
    for column in range(5):
        piece = ids[:, column : column + 1]
        losses.append(model(piece, labels=piece, past_key_values=cache, logits_to_keep=0).loss)
    sum(losses).backward()


# Those whose single token used to overwrite what the backward pass needs, and one that attends only.
@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2", "qwen3"])
def test_gradient_of_a_single_token_is_the_difference_quotient(family):
    model, ids = sleeping(family), tokens(1, 5)
    parameters = list(model.parameters())
    direction = [draw(*p.shape, seed=place) for place, p in enumerate(parameters)]

    def loss(step):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter += step * way
        try:
            return model(ids, labels=ids, logits_to_keep=0).loss
        finally:
            with torch.no_grad():
                for parameter, way in zip(parameters, direction, strict=True):
                    parameter -= step * way

    with true_float64():
        model.zero_grad()
        model(ids, labels=ids, logits_to_keep=0).loss.backward()
        slope = sum((p.grad * way).sum() for p, way in zip(parameters, direction, strict=True) if p.grad is not None)
        with torch.no_grad():
            quotient = (loss(1e-7) - loss(-1e-7)) / 2e-7
    assert_close(slope, quotient, QUOTIENT, family)


def test_a_state_that_is_told_to_overwrite_itself_stays():
    old = torch.ones(1, 1, 2, 2, requires_grad=True)
    cache = WindowCache(0, 1, LayerState(None, old))
    lent = cache.get_recurrent_state(0)
    decay = torch.full((2, 2), 0.5, requires_grad=True)
    new = lent * decay
    lent.copy_(new)
    after = cache.written(new)
    assert type(new) is torch.Tensor and type(after.recurrent) is torch.Tensor
    assert torch.equal(after.recurrent, torch.full_like(old, 0.5)) and torch.equal(old, torch.ones_like(old))
    after.recurrent.sum().backward()
    assert torch.equal(old.grad, torch.full_like(old, 0.5)) and torch.equal(decay.grad, torch.ones_like(decay))


def test_a_kernel_without_gradient_is_refused_where_gradient_is_wanted():
    state = LayerState(None, torch.ones(1, 1, 2, 2))
    cache = WindowCache(0, 1, state)
    lent = cache.get_recurrent_state(0)
    lent.view(-1).detach().numpy()[:] = 3.0  # as a kernel writes, past autograd
    output = torch.ones(1, 1, 2)
    assert torch.equal(cache.written(output).recurrent, torch.full((1, 1, 2, 2), 3.0))
    assert torch.equal(state.recurrent, torch.ones(1, 1, 2, 2)), "the snapshot was overwritten"
    with pytest.raises(UnsupportedModelError, match="mamba-ssm"):
        cache.written(output.requires_grad_())


# --- flash attention: told by a number how far to look, and looking for packed rows in the positions


RECORDED: list[tuple[int, int | None, bool]] = []


def recording_flash(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **kwargs
):
    """What flash attention computes, [B, T, H, d], and a note of what it was told."""
    RECORDED.append((module.layer_idx, sliding_window, kwargs.get("position_ids") is not None))
    n_new, n_keys = query.shape[2], key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    back = torch.arange(n_keys - n_new, n_keys)[:, None] - torch.arange(n_keys)[None, :]
    seen = (back >= 0) if sliding_window is None else (back >= 0) & (back < sliding_window)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := kwargs.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    return (scores.masked_fill(~seen, -1e30).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_recording", recording_flash)
AttentionMaskInterface.register("flash_recording", flash_attention_mask)


def belongings(base):
    """Everything that the modules of a base hold beside parameters, as it reads now."""
    skipped = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
    found = {}
    for name, module in base.named_modules():
        for key, value in vars(module).items():
            if key not in skipped:
                found[name, key] = id(value) if key == "config" else repr(value)
        found[name, "hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return found


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_sees_as_far_as_the_mask_and_the_base_stays(family, eviction):
    ids = tokens(1, 11)
    pieces = [ids[:, :6], ids[:, 6:7], ids[:, 7:]]
    masked = sleeping(family, eviction=eviction)
    flash = copy.deepcopy(masked)
    if family == "gemma2":  # scaled_dot_product_attention has no cap for its scores
        masked.language_model.set_attn_implementation("eager")
    flash.language_model.config._attn_implementation = "flash_recording"
    before = belongings(flash.language_model)
    RECORDED.clear()
    # Gemma2 attends eagerly, and eager attention asks for its softmax in float32 by name.
    tolerance = FLOAT32 if family == "gemma2" else EXACT
    with torch.no_grad(), true_float64():
        caches = SleepCache(), SleepCache()
        for piece in pieces:
            expected = masked(piece, past_key_values=caches[0]).logits
            assert_close(flash(piece, past_key_values=caches[1]).logits, expected, tolerance, family)
    attending = [kind for kind in flash.blocks.kinds if "attention" in kind or "hybrid" in kind]
    if any(not kind.startswith("linear") for kind in attending):
        assert RECORDED
    own = getattr(flash.language_model.config, "sliding_window", None)
    reaches = {reach for _, reach, _ in RECORDED}
    assert reaches <= ({4} if eviction == "sliding" else {None, own}), reaches
    assert belongings(flash.unload()) == before


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "zamba2"])
def test_the_base_stays_when_a_call_fails(family, monkeypatch):
    model = sleeping(family, eviction="sliding")
    model.language_model.config._attn_implementation = "flash_recording"
    before = belongings(model.language_model)

    def failing(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_recording", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(tokens(1, 3))
    assert belongings(model.unload()) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_attention_gets_no_positions_where_there_are_tables(family):
    """With them it looks for packed rows, which makes the host wait for the device in every layer at batch 1."""
    model = sleeping(family)
    model.language_model.config._attn_implementation = "flash_recording"
    RECORDED.clear()
    with torch.no_grad():
        model(tokens(1, 6))
    tables = getattr(model.blocks.decoder, "rotary_emb", None) is not None
    assert not (tables and any(positions for _, _, positions in RECORDED))


# --- threads


class Overtaking:
    """Of two threads that come to a place, the first goes on when the second is there, and that one when it is called.

    Where the second is kept from coming the first goes on by itself.
    """

    def __init__(self):
        self.first, self.second, self.called = threading.Lock(), threading.Event(), threading.Event()
        self.by_itself = False

    def here(self, *_):
        if self.first.acquire(blocking=False):
            self.by_itself = not self.second.wait(0.5)
        elif not self.by_itself and not self.second.is_set():
            self.second.set()
            assert self.called.wait(60)

    def run(self, call):
        """Both threads, the second of which is called when the first has ended; what the two gave."""
        found = []
        threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(2)]
        for thread in threads:
            thread.start()
        while all(thread.is_alive() for thread in threads):
            threads[0].join(0.01)
        self.called.set()
        for thread in threads:
            thread.join(60)
        return found


@pytest.mark.parametrize("family", ["nemotron_h", "zamba2"])
def test_two_threads_leave_the_base_as_it_was(family):
    """Mixers are changed for the length of a call; a second thread must not put back what the first one changed."""
    model, ids = sleeping(family).eval(), tokens(1, 1)
    before, overtaking = set(model.state_dict()), Overtaking()

    def read():
        with torch.no_grad():
            return model(ids).logits

    expected = read()
    hook = model.blocks.layers[0].register_forward_pre_hook(overtaking.here)
    found = overtaking.run(read)
    hook.remove()
    assert len(found) == 2 and all(torch.equal(logits, expected) for logits in found)
    assert set(model.state_dict()) == before


def test_of_two_threads_each_has_its_reach_to_the_end():
    layer, overtaking = nn.Module(), Overtaking()
    layer.sliding_window = None
    narrowing = Narrowing(layer)

    def look():
        with narrowing.to(3):
            overtaking.here()
            return layer.sliding_window

    assert overtaking.run(look) == [3, 3] and layer.sliding_window is None


# --- verify


class Factor:
    """A factor at one place of a base that its own forward pass applies and a walk over its layers does not."""

    def __init__(self, base, place, factor):
        self.active = False
        decoder = getattr(base, base.base_model_prefix)
        if place == "logits":
            base.lm_head.register_forward_hook(self.scaled(factor))
        elif place == "embeddings":
            decoder.layers[0].register_forward_pre_hook(
                lambda _, args: (args[0] * (factor if self.active else 1), *args[1:])
            )
        else:
            decoder.layers[1].mlp.register_forward_hook(self.scaled(factor))
        forward = base.forward

        def own(*args, **kwargs):
            self.active = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.active = False

        base.forward = own

    def scaled(self, factor):
        return lambda _, __, output: output * factor if self.active else output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["logits", "embeddings", "one branch"])
def test_a_factor_that_is_wrong_by_four_percent_is_refused(dtype, place):
    base = tiny_base("llama", dtype)
    Factor(base, place, 1.04)
    with pytest.raises(UnsupportedModelError, match="convention"):
        sleepify(base)


def test_a_factor_on_single_tokens_alone_is_refused():
    class Faulty(Host):
        def logits(self, hidden_states):
            return super().logits(hidden_states) * (1.02 if hidden_states.shape[1] == 1 else 1)

    base = tiny_base("llama", torch.bfloat16)
    verify(host_class(base.config)(base))
    with pytest.raises(UnsupportedModelError, match="in length, 1 token"):
        verify(Faulty(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted_in_every_precision(family, dtype):
    base = tiny_base(family, dtype)
    verify(host_class(base.config)(base))


# --- devices


def test_lengths_go_where_the_hidden_states_are():
    """A base that is spread over devices carries its hidden states along, and an inserted layer sits beside its own."""
    base = tiny_base("qwen3")
    seen = []

    class Inserted(nn.Module):
        def forward(self, hidden_states, state, lengths):
            seen.append((hidden_states.device.type, lengths.device.type))
            return hidden_states, LayerState()

    class Moved(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states.to("meta")

    base.model.layers[1] = Moved()
    host = Host(base, {0: Inserted(), 1: Inserted()})
    with torch.no_grad():
        memory = Memory(2)
        hidden, frame = host.open(tokens(2, 4), (4, 2), (0, 0), memory, keep_keys=False)
        host.run(hidden, memory, frame, 0, 2)
    assert seen == [("cpu", "cpu"), ("meta", "meta")]


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_padding_that_sees_nothing_does_not_reach_real_tokens_in_float64(family):
    """Eager attention computes its softmax in float32, in which a mask of float64's lowest numbers is infinite."""
    model = sleeping(family, window_size=6)
    model.set_attn_implementation("eager")
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :-1] = 0
    together, alone = model(ids, attention_mask=mask).logits[1:, -1:], model(ids[1:, -1:]).logits
    assert_close(together, alone, FLOAT32, "a short row beside a long one")
