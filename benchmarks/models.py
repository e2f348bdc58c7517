"""The models that are measured, one step of training of each kind, and the arithmetic that a step takes.

    ideal(N) = Wc (1 + (N-1) f) + r        passes over a window, for a text of Wc full windows and r of another

A window that is slept on goes once through every layer and N-1 more times through the fraction f that is looped; the
supervised rest of the text is read once. The *parallel hybrid* is what one would train instead: the same base and the
same inserted layers, over the whole text in one call, every token attending to the latest L positions, no loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sleepify import FastWeightConfig, SleepForCausalLM, sleepify
from sleepify import sleep as algorithm
from sleepify.memory import Memory
from sleepify.schedule import cost, passes, schedule
from sleepify.snapshot import Snapshot

SUPERVISED = 8
"""Tokens of a text that carry a label: its last."""
Batch = tuple[Tensor, Tensor]
"""Ids [B, T] and labels [B, T]."""


@dataclass(frozen=True)
class Setting:
    """How a step is run where there is a choice.

    Attributes:
        batch_size: rows of a step.
        checkpoint: "none", "window", "loop" or "selective"; for the parallel hybrid anything but "none" is per layer.
    """

    batch_size: int = 1
    checkpoint: str = "none"


def small_ouro(tiny: bool = False, n_layers: int = 4, **sleep: Any) -> SleepForCausalLM:
    """Ouro's architecture with two Jet layers, of a size where a CPU spends its time on matrix products.

    The last Jet layer follows the last layer, so that every pass is a whole pass and ``ideal`` is exact.
    """
    width = 32 if tiny else 256
    architecture: Any = CONFIG_MAPPING["ouro"]
    config = architecture(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=32768,
        total_ut_steps=1,
    )
    torch.manual_seed(0)
    inserted = FastWeightConfig(rule="jet", layers=sorted({(n_layers - 1) // 2, n_layers - 1}))
    model = sleepify(AutoModelForCausalLM.from_config(config), fast_weights=inserted, **sleep)
    return wake_up(model).train()


def wake_up(model: SleepForCausalLM) -> SleepForCausalLM:
    """Give the inserted layers an output, which they do not have until they are trained."""
    layers: Any = model.fast_weights
    for layer in layers:
        if layer.o_proj.weight.device.type != "meta":
            torch.nn.init.normal_(layer.o_proj.weight, std=0.02)
    return model


def text(model: SleepForCausalLM, tokens: int, batch_size: int = 1) -> Batch:
    """Random ids [B, T], and labels on the last tokens."""
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.text_config.vocab_size, (batch_size, tokens), generator=generator).to(
        embeddings.weight.device
    )
    labels = torch.full_like(ids, -100)
    labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
    return ids, labels


def looped_share(model: SleepForCausalLM) -> float:
    """f, the fraction of layers that are looped."""
    start, stop = model.config.loop_range
    return (stop - start) / model.config.text_config.num_hidden_layers


def ideal(tokens: int, window: int, n_loops: int, looped: float) -> float:
    """Passes over a window that a training step must take (see the module).

    Raises:
        ValueError: if the supervised tokens do not all lie in the window at which the text ends.
    """
    windows = (tokens - 1) // window
    if tokens - windows * window <= SUPERVISED:
        raise ValueError(f"expected more than {SUPERVISED} tokens after the last full window of {window}, T = {tokens}")
    wanted = np.zeros((1, tokens), dtype=bool)
    wanted[0, -1] = True
    rounds = schedule([0], [tokens], wanted, window, keep=False).rounds
    # A model of a thousand layers: a fraction of them is then a whole number.
    inside = passes(n_loops, (0, round(1000 * looped)), last_writer=1000)
    return cost(rounds, window, inside, 1000) / (1000 * window)


def windowed_step(
    model: SleepForCausalLM, batch: Batch, window: int, n_loops: int, setting: Setting, eviction: str = "hard"
) -> None:
    """Forward and backward of a text read window by window, slept on between."""
    config = model.config
    config.window_size, config.eviction, config.checkpoint = window, eviction, setting.checkpoint
    if setting.checkpoint == "none":
        model.gradient_checkpointing_disable()
    else:
        model.gradient_checkpointing_enable()
    model.zero_grad(set_to_none=True)
    ids, labels = batch
    model(ids, labels=labels, n_loops=n_loops).loss.backward()


def parallel_step(model: SleepForCausalLM, batch: Batch, window: int, setting: Setting, attention: str) -> None:
    """Forward and backward of the parallel hybrid.

    Args:
        model: gives base and inserted layers; it does not sleep here.
        batch: ids and labels.
        window: L.
        setting: of the step.
        attention: "blocks" or one of transformers' implementations with a window ("flash_attention_2").
    """
    model.zero_grad(set_to_none=True)
    with attending(model, attention, window):  # the backward pass, too, where layers are run again
        parallel_loss(model, batch, window, setting.checkpoint != "none").backward()


def parallel_loss(model: SleepForCausalLM, batch: Batch, window: int, recompute: bool = False) -> Tensor:
    """The parallel hybrid's loss, by the attention that is set; ``recompute`` drops the activations of every layer."""
    ids, labels = batch
    own = model.blocks
    host = type(own)(model.language_model, own.inserted, own.loop_range, window)
    batch_size, tokens = ids.shape
    empty = Memory(batch_size)
    hidden, frame = host.open(ids, [tokens] * batch_size, [0] * batch_size, empty, keep_keys=False)
    for index in range(host.n_layers):
        if recompute:
            hidden = checkpoint(_one_layer, host, hidden, empty, frame, index, use_reentrant=False)
        else:
            hidden = _one_layer(host, hidden, empty, frame, index)
    scores = host.logits(hidden[:, -SUPERVISED - 1 : -1].flatten(0, 1))
    return F.cross_entropy(
        scores.to(torch.promote_types(scores.dtype, torch.float32)), labels[:, -SUPERVISED:].flatten()
    )


def _one_layer(host: Any, hidden: Tensor, memory: Memory, frame: Any, index: int) -> Tensor:
    return host.run(hidden, memory, frame, index, index + 1)[0]


# --- attention --------------------------------------------------------------------------------------------------------


@contextmanager
def attending(model: SleepForCausalLM, attention: str, window: int) -> Iterator[None]:
    """Use an attention implementation for a while; "blocks" is ours of this module, "half" counts causal arithmetic."""
    config = model.config.text_config
    before = config._attn_implementation
    if attention == "blocks":
        attention = f"blocks_{window}"
        AttentionInterface.register(attention, partial(_attend_in_blocks, window))
    elif attention == "half":
        AttentionInterface.register(attention, _attend_to_half)
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend_in_blocks(
    window: int, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Attention to the latest ``window`` positions, [B, H, T, d] -> [B, T, H, d], exactly, at 2 L keys per query.

    Blocks of L queries meet their own block's keys and those of the block before: without it a CPU would compute, and
    then mask, all T keys of every query, which nobody would choose.
    """
    batch, heads, tokens, width = q.shape
    groups = heads // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    missing = -tokens % window
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, window)).transpose(1, 2) for x in (q, k, v))
    n_blocks = q.shape[1]
    before = [F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1] for x in (k, v)]
    k, v = (torch.cat([old, new], 3).flatten(0, 1) for old, new in zip(before, (k, v), strict=True))
    query = torch.arange(window, device=q.device)[:, None] + window
    key = torch.arange(2 * window, device=q.device)[None, :]
    band = (key <= query) & (key > query - window)
    seen = band.expand(n_blocks, 1, -1, -1).clone()
    seen[0, :, :, :window] = False  # there is nothing before the first block
    seen = seen.repeat(batch, 1, 1, 1)
    output = F.scaled_dot_product_attention(q.flatten(0, 1), k, v, attn_mask=seen, scale=scaling)
    output = output.unflatten(0, (batch, n_blocks)).transpose(2, 3).flatten(1, 2)
    return output[:, :tokens], None


def _attend_to_half(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
    """As many products as causal attention needs, for counting: a query meets half of the keys on average."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x[:, :, : (x.shape[2] + 1) // 2].repeat_interleave(groups, dim=1) for x in (k, v))
    return (q @ k.mT @ v).transpose(1, 2), None


# --- arithmetic -------------------------------------------------------------------------------------------------------


def count_flops(model: SleepForCausalLM, tokens: int, window: int, n_loops: int) -> int:
    """Floating-point operations of a training step of one row: three times those of its forward pass, recomputation not
    included.

    Args:
        model: with weights on the meta device.
        tokens, window, n_loops: as in `windowed_step`.
    """
    windows = (tokens - 1) // window
    rest = tokens - windows * window
    awake = _count_forward(model, rest, window, 1)
    # Every window takes the same, and so does every pass between the first and the last.
    once, twice = (_count_forward(model, window + rest, window, n) - awake for n in (1, 2))
    return 3 * (awake + windows * (once + (n_loops - 1) * (twice - once)))


@lru_cache
@torch.no_grad()
def _count_forward(model: SleepForCausalLM, tokens: int, window: int, n_loops: int) -> int:
    """Matrix products of a forward pass, counted while it runs on the meta device; of attention the causal half."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    wanted = np.zeros((1, tokens), dtype=bool)
    wanted[:, -SUPERVISED - 1 : -1] = True
    options = replace(model.options(n_loops), window_size=window)
    rounds = schedule([0], [tokens], wanted, window, keep=False, may_share=options.may_share).rounds
    session = Snapshot.empty("counted", 1, window, ids.device)
    with attending(model, "half", window), FlopCounterMode(display=False) as counter:
        _, pieces = algorithm.read(model.blocks, session, ids, rounds, options, keep=False)
        model.blocks.logits(torch.cat(pieces))
    return int(counter.get_total_flops())
