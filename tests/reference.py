"""Sleep written out slowly, one row at a time, straight from Algorithm 1 and the contract.

Nothing is shared with sleepify's loop, memory or drivers: no batching, no cache of the awake, explicit masks, explicit
positions. It uses the modules of the model (decoder layers of the Llama convention, inserted layers) and calls them
token range by token range. Slow and obvious is the point: the fast path is compared with this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleepify import SleepForCausalLM

IGNORE = -100


class Retained:
    """The cache that a decoder layer sees: it puts the retained keys and values before the new ones and notes both."""

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.kept = kept
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            keys = torch.cat([self.kept[layer][0], keys], 2)
            values = torch.cat([self.kept[layer][1], values], 2)
        self.seen[layer] = (keys, values)
        return keys, values


@dataclass
class Trace:
    """What a row gave: logits of every token [T, V], and state and retained keys after each sleep."""

    logits: Tensor
    states: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=list)
    kept: list[dict[int, tuple[Tensor, Tensor]]] = field(default_factory=list)


def read_row(model: SleepForCausalLM, row: Tensor, n_loops: int | None = None, detach_before: int = 0) -> Trace:
    """All logits of one row [T] of ids, with sleep at every full window that is followed by another token.

    ``detach_before``: the state is a constant up to and including that many sleeps (truncated backpropagation).
    """
    config, base = model.config, model.language_model
    n_loops = n_loops or config.n_loops
    size, sliding = config.window_size, config.eviction == "sliding"
    inserted = dict(zip(config.fast_weights.layers, model.fast_weights, strict=True))
    start, stop = config.loop_range
    closes = config.text_config.model_type == "ouro"
    decoder = base.model

    def layers(hidden, state, kept, positions, first, last):
        """Layers [first, last); returns hidden, the state after them, and the keys seen by them."""
        past = next(iter(kept.values()))[0].shape[2] if kept else 0
        n_tokens = hidden.shape[1]
        at = torch.arange(past, past + n_tokens)[:, None]
        key = torch.arange(past + n_tokens)[None, :]
        visible = key <= at
        if sliding:
            visible &= key > at - size
        mask = torch.where(visible, 0.0, float("-inf")).to(hidden.dtype)[None, None]
        rotary = decoder.rotary_emb(hidden, positions[None])
        cache, state = Retained(kept), dict(state)
        for index in range(first, last):
            output = decoder.layers[index](
                hidden,
                attention_mask=mask,
                position_ids=positions[None],
                position_embeddings=rotary,
                past_key_values=cache,
            )
            hidden = output[0] if isinstance(output, tuple) else output
            if index in inserted:
                # Token by token, each with the state that the one before it left.
                pieces, layer_state = [], state.get(index)
                for t in range(n_tokens):
                    piece, layer_state = inserted[index](hidden[:, t : t + 1], layer_state)
                    pieces.append(piece)
                hidden, state[index] = torch.cat(pieces, 1), layer_state
        return hidden, state, cache.seen

    trace = Trace(torch.empty(0))
    logits, state, kept = [], {}, {}
    for begin in range(0, len(row), size):
        window = row[begin : begin + size]
        offset = begin if sliding else 0
        positions = torch.arange(offset, offset + len(window))
        embedded = decoder.embed_tokens(window[None])
        awake, _, _ = layers(embedded, state, kept, positions, 0, len(decoder.layers))
        logits.append(base.lm_head(decoder.norm(awake))[0])
        if begin + size >= len(row):
            break
        before = dict(state)
        hidden, now, keys = layers(embedded, state, kept, positions, 0, start)
        for loop in range(n_loops):
            for index in inserted:
                if start <= index < stop and index in before and index in now:
                    now[index] = (before[index][0], now[index][1])
                elif start <= index < stop and index in now:
                    now[index] = (torch.zeros_like(now[index][0]), now[index][1])
            hidden, now, looped_keys = layers(hidden, now, kept, positions, start, stop)
            if closes and loop + 1 < n_loops:
                hidden = decoder.norm(hidden)
        hidden, now, coda_keys = layers(hidden, now, kept, positions, stop, len(decoder.layers))
        state = now
        if len(trace.states) < detach_before:
            state = {i: tuple(t.detach() for t in pair) for i, pair in state.items()}
        if sliding:
            seen = keys | looped_keys | coda_keys
            kept = (
                {i: (k[:, :, -(size - 1) :], v[:, :, -(size - 1) :]) for i, (k, v) in seen.items()} if size > 1 else {}
            )
        trace.states.append(state)
        trace.kept.append(kept)
    trace.logits = torch.cat(logits)
    return trace


def loss_of(trace: Trace, labels: Tensor) -> tuple[Tensor, int]:
    """Summed cross entropy of one row's labels [T] (shifted by one) and their number."""
    targets = torch.cat([labels[1:], labels.new_full((1,), IGNORE)])
    chosen = targets != IGNORE
    if not chosen.any():
        return trace.logits.sum() * 0, 0
    total = torch.nn.functional.cross_entropy(trace.logits[chosen], targets[chosen], reduction="sum")
    return total, int(chosen.sum())
