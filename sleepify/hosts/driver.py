"""Driving a base model's decoder layer by layer, so that sleep.py can loop over any part of it.

transformers' decoders follow one convention: ``layers`` that map hidden states to hidden states given masks, rotary
tables and a cache. `Host` walks it once for all families; what a family does differently is a subclass in `families`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from sleepify.hosts.conventions import ATTENTION, BOTH, RECURRENT, find_decoder, find_norm, layer_kinds
from sleepify.hosts.window_cache import WindowCache
from sleepify.memory import LayerState, Memory


@dataclass(frozen=True)
class Frame:
    """What is computed once per window for all layers and passes.

    Attributes:
        position_ids: [1 or B, T].
        masks: attention mask per layer, in the form that the attention implementation wants.
        rotary: rotary tables per kind of layer.
        lengths: real tokens per row [B], None if all T are.
        embeddings: the embedded tokens [B, T, D] (for bases that read them again in later layers).
        keep_keys: whether keys and values are remembered.
    """

    position_ids: Tensor
    masks: dict[int | None, Any]
    rotary: dict[str, Any]
    lengths: Tensor | None
    embeddings: Tensor
    keep_keys: bool


class Host:
    """A causal LM of transformers as sleep.py's `Blocks`.

    Args:
        language_model: the base, with its head.
        inserted: fast-weight layers by the base layer that they follow.
        loop_range: layers [start, stop) to loop.
        window: L under sliding eviction (no token attends further back), None under hard eviction.

    Raises:
        UnsupportedModelError: if the base lacks a part; the message names it.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        inserted: dict[int, nn.Module] | None = None,
        loop_range: tuple[int, int] | None = None,
        window: int | None = None,
    ) -> None:
        self.language_model = language_model
        self.config: PreTrainedConfig = language_model.config
        self.decoder = find_decoder(language_model)
        self.layers = self.decoder.layers
        self.norm = find_norm(self.decoder)
        self.kinds = layer_kinds(self.config)
        self.n_layers = len(self.kinds)
        self.inserted = inserted or {}
        self.loop_range = loop_range or (0, self.n_layers)
        self.window = window

    # --- what the algorithm asks for -------------------------------------------------------------------------------

    @property
    def masks_padding(self) -> bool:
        """Whether every recurrent layer takes ``lengths``; layers of transformers let padding into their state."""
        recurrent = (self.layers[i] for i, kind in enumerate(self.kinds) if kind in RECURRENT | BOTH)
        return all("lengths" in _accepted(layer) for layer in recurrent)

    def last_writer(self, keep_keys: bool) -> int:
        """Layers [0, last_writer) are all that write what survives a window."""
        kinds = RECURRENT | BOTH | (ATTENTION if keep_keys else set())
        writers = [i for i, kind in enumerate(self.kinds) if kind in kinds] + list(self.inserted)
        return max(writers, default=-1) + 1

    def open(
        self, input_ids: Tensor, lengths: Sequence[int], positions: Sequence[int], memory: Memory, keep_keys: bool
    ) -> tuple[Tensor, Frame]:
        """Embed a window and make masks and rotary tables for it."""
        hidden = self.embed(input_ids)
        batch, width = input_ids.shape
        device = hidden.device
        steps = torch.arange(width, device=device)[None, :]
        if len(set(positions)) == 1:
            position_ids = steps + positions[0]
        else:
            position_ids = steps + torch.tensor(positions, device=device)[:, None]

        ragged = any(length != width for length in lengths)
        real = torch.tensor(lengths, device=device) if ragged else None
        valid = None
        columns = memory.columns
        if ragged or any(length != columns for length in memory.kv_lengths):
            remembered = torch.tensor(memory.kv_lengths, device=device)[:, None]
            old = torch.arange(columns, device=device)[None, :] >= columns - remembered
            new = steps < torch.tensor(lengths, device=device)[:, None]
            valid = torch.cat([old, new], 1)
        past = WindowCache(columns, width, fixed_shapes=memory.fixed)
        masks = {
            reach: self._mask(reach, hidden, valid, past, position_ids)
            for reach in {self._reach(i) for i in self._attends()}
        }
        return hidden, Frame(position_ids, masks, self.rotary(hidden, position_ids), real, hidden, keep_keys)

    def run(self, hidden_states: Tensor, memory: Memory, frame: Frame, start: int, stop: int) -> tuple[Tensor, Memory]:
        """Layers [start, stop) and what is inserted after them."""
        width, columns = hidden_states.shape[1], memory.columns
        state, kv = dict(memory.state), dict(memory.kv)
        for index in range(start, stop):
            cache = WindowCache(columns, width, state.get((index, 0)), kv.get(index), frame.keep_keys)
            hidden_states = self.layer(index, hidden_states, frame, cache)
            if cache.state is not cache.before:
                state[(index, 0)] = cache.state
            if cache.kv is not None:
                kv[index] = cache.kv
            if (layer := self.inserted.get(index)) is not None:
                hidden_states, after = layer(hidden_states, state.get((index, 1)), frame.lengths)
                state[(index, 1)] = LayerState(*after)
        return hidden_states, replace(memory, state=state, kv=kv)

    def close_loop(self, hidden_states: Tensor) -> Tensor:
        """Most architectures hand the residual stream on as it is."""
        return hidden_states

    # --- one base model --------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] ids to [B, T, D]."""
        hidden = self.language_model.get_input_embeddings()(input_ids)
        scale = getattr(self.decoder, "embedding_multiplier", None)
        if scale is not None:
            hidden = hidden * scale
        dropout = getattr(self.decoder, "emb_dropout", None)
        return hidden if dropout is None else dropout(hidden)

    def rotary(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Rotary tables per kind of attention layer; None where the model has none."""
        module = getattr(self.decoder, "rotary_emb", None)
        kinds = {self.kinds[i] for i in self._attends()}
        if module is None:
            return dict.fromkeys(kinds)
        if "layer_type" in _accepted(module):
            return {kind: module(hidden_states, position_ids, kind) for kind in kinds}
        return dict.fromkeys(kinds, module(hidden_states, position_ids))

    def layer(self, index: int, hidden_states: Tensor, frame: Frame, cache: WindowCache) -> Tensor:
        """Layer ``index`` of the base."""
        module = self.layers[index]
        accepted = _accepted(module)
        arguments = self.layer_arguments(index, frame, cache)
        if "*" not in accepted:
            arguments = {name: value for name, value in arguments.items() if name in accepted}
        output = module(hidden_states, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def layer_arguments(self, index: int, frame: Frame, cache: WindowCache) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, by transformers' names."""
        kind = self.kinds[index]
        accepted = _accepted(self.layers[index])
        arguments: dict[str, Any] = {
            "attention_mask": frame.masks[self._reach(index)] if kind in ATTENTION | BOTH else None,
            "position_ids": frame.position_ids,
            "layer_past" if "layer_past" in accepted else "past_key_values": cache,
            "use_cache": True,
        }
        # Recurrent layers take no position, but many share a signature with the attention layers beside them.
        rotary = frame.rotary.get(kind, next(iter(frame.rotary.values()), None))
        if rotary is not None:
            arguments["position_embeddings"] = rotary
        if "lengths" in accepted:
            arguments["lengths"] = frame.lengths
        if self.window is not None and self._is_flash() and kind in ATTENTION | BOTH:
            attention: Any = getattr(self.layers[index], "self_attn", None)
            if hasattr(attention, "sliding_window"):
                attention.sliding_window = self._reach(index)
            else:
                arguments["sliding_window"] = self._reach(index)
        return arguments

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm, head and what the family does to its logits; [..., D] to [..., V]."""
        head = self.language_model.get_output_embeddings()
        logits = head(self.norm(hidden_states).to(head.weight.dtype))
        config = self.config
        for name in ("logit_scale", "lm_head_multiplier"):
            if (factor := getattr(config, name, None)) is not None:
                logits = logits * factor
        if (divisor := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def base_logits(self, input_ids: Tensor) -> Tensor:
        """The base's own logits [B, T, V], by its own forward pass."""
        return self.language_model(input_ids=input_ids, use_cache=False).logits

    # --- masks -----------------------------------------------------------------------------------------------------

    def _attends(self) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in ATTENTION | BOTH]

    def _reach(self, index: int) -> int | None:
        """How many positions a token of this layer sees, itself included; None for all there are."""
        own = getattr(self.config, "sliding_window", None) if "sliding" in self.kinds[index] else None
        return min((reach for reach in (own, self.window) if reach is not None), default=None)

    def _is_flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    def _mask(
        self, reach: int | None, hidden: Tensor, valid: Tensor | None, past: WindowCache, position_ids: Tensor
    ) -> Any:
        arguments: dict[str, Any] = {
            "inputs_embeds": hidden,
            "attention_mask": valid,
            "past_key_values": past,
            "position_ids": position_ids,
        }
        if reach is None:
            return create_causal_mask(config=self.config, **arguments)
        config = copy.copy(self.config)
        config.sliding_window = reach
        return create_sliding_window_causal_mask(config=config, **arguments)


def _accepted(module: nn.Module) -> frozenset[str]:
    """Names of a module's forward parameters, with "*" if it takes any keyword."""
    return _parameters(type(module))  # type: ignore[arg-type]  # mypy does not see that classes are hashable


@lru_cache(maxsize=256)
def _parameters(module_class: type[nn.Module]) -> frozenset[str]:
    parameters = inspect.signature(module_class.forward).parameters.values()
    return frozenset("*" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters)
