"""Driving a base's decoder layer by layer, so that sleep.py can loop over any part of it.

transformers' decoders follow one convention: ``layers`` that map hidden states to hidden states given masks, rotary
tables and a cache. `Host` walks it once for all families; what a family does differently is a subclass in `families`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from sleepify.arena import Arena
from sleepify.errors import UnsupportedModelError
from sleepify.hosts.conventions import ATTENTION, BOTH, RECURRENT, find_decoder, find_norm, layer_kinds
from sleepify.hosts.narrowing import Narrowing
from sleepify.hosts.rotary import tables_of
from sleepify.hosts.window_cache import WindowCache
from sleepify.memory import LayerState, Memory, changed

# Attention functions that take no mask as one that hides nothing (flash attention too, by any of its names).
_MASK_FREE = {"eager", "sdpa"}
# What may be handed to a layer that takes any keyword.
_KEYWORDS = {"attention_mask", "use_cache", "position_ids", "position_embeddings", "sliding_window"}


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
        place: the column [1] of its arena that a single token's keys and values are written into; None if the memory
            has none.
    """

    position_ids: Tensor
    masks: dict[int | None, Any]
    rotary: dict[str, Any]
    lengths: Tensor | None
    embeddings: Tensor
    keep_keys: bool
    place: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """What is the same whenever one layer is called.

    Attributes:
        key: its name among the decoder's layers.
        kind: in transformers' words.
        attends: whether it reads keys and values.
        reach: how many positions a token sees, itself included; None for all there are.
        takes: what may be handed to it.
        cache: the name by which it takes its cache.
    """

    key: str
    kind: str
    attends: bool
    reach: int | None
    takes: frozenset[str]
    cache: str


class Host:
    """A base as sleep.py's `Blocks`. Made once for a model and kept: what does not change is looked up here.

    Args:
        language_model: the base, a causal LM of transformers with its head.
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
        self.kinds = layer_kinds(self.config)
        self.n_layers = len(self.kinds)
        self.inserted = inserted or {}
        self.loop_range = loop_range or (0, self.n_layers)
        self.window = window
        self._calls = [self._call(i) for i in range(self.n_layers)]
        attending = [call for call in self._calls if call.attends]
        self._reaches = list(dict.fromkeys(call.reach for call in attending))
        # Recurrent layers may ask for rotary tables too, of which they make no use.
        self._attending_kinds = list(dict.fromkeys(call.kind for call in attending)) or ["full_attention"]
        self._rotary: nn.Module | None = getattr(self.decoder, "rotary_emb", None)
        self._tables = None if self._rotary is None else tables_of(self._rotary, self.config, window)
        self._rotary_by_kind = self._rotary is not None and "layer_type" in _parameters(self._rotary)
        self._embedding_scale = getattr(self.decoder, "embedding_multiplier", None)
        self._embedding_dropout = getattr(self.decoder, "emb_dropout", None)
        factors = (getattr(self.config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
        self._factors = [factor for factor in factors if factor is not None]
        self._divisor: float | None = getattr(self.config, "logits_scaling", None)
        self._cap: float | None = getattr(self.config, "final_logit_softcapping", None)
        # Sliding eviction under flash attention only.
        self._narrowing: dict[int, Narrowing] = {}

    @property
    def norm(self) -> nn.Module:
        """The base's final norm, looked up anew: peft puts another module in its place to train it whole."""
        return find_norm(self.decoder)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters of the base that no pass of a sleeping model uses."""
        return []

    def _call(self, index: int) -> _Call:
        kind, takes = self.kinds[index], _parameters(self.layers[index])
        own = getattr(self.config, "sliding_window", None) if "sliding" in kind else None
        return _Call(
            key=str(index),
            kind=kind,
            attends=kind in ATTENTION | BOTH,
            reach=min((reach for reach in (own, self.window) if reach is not None), default=None),
            takes=takes | _KEYWORDS if "*" in takes else takes,
            cache="layer_past" if "layer_past" in takes else "past_key_values",
        )

    # --- what the algorithm asks for -------------------------------------------------------------------------------

    @property
    def masks_padding(self) -> bool:
        """Whether every recurrent layer takes ``lengths``; layers of transformers let padding into their state."""
        return all("lengths" in call.takes for call in self._calls if call.kind in RECURRENT | BOTH)

    @property
    def changes_modules(self) -> bool:
        """Whether modules are changed for the length of a call, so that no other thread may call them meanwhile."""
        return self.window is not None and self._is_flash()

    def last_writer(self, keep_keys: bool) -> int:
        """Layers [0, last_writer) are all that write what survives a window."""
        kinds = RECURRENT | BOTH | (ATTENTION if keep_keys else set())
        writers = [i for i, kind in enumerate(self.kinds) if kind in kinds] + list(self.inserted)
        return max(writers, default=-1) + 1

    def open(
        self, input_ids: Tensor, lengths: Sequence[int], positions: Sequence[int], memory: Memory, keep_keys: bool
    ) -> tuple[Tensor, Frame]:
        """Embed a window and make masks and rotary tables for it."""
        if memory.arena is not None:
            numbers = _sent([*positions, *memory.kv_lengths, memory.columns], input_ids.device)
            return self.open_single(input_ids, numbers, memory.arena.columns)
        hidden = self.embed(input_ids)
        batch, width = input_ids.shape
        device = hidden.device
        first = positions[0]
        if all(position == first for position in positions):
            position_ids = torch.arange(first, first + width, device=device)[None, :]
        else:
            steps = torch.arange(width, device=device)[None, :]
            position_ids = steps + _sent(positions, device)[:, None]

        ragged = any(length != width for length in lengths)
        real = _sent(lengths, device) if ragged else None
        valid = None
        columns = memory.columns
        if ragged or any(length != columns for length in memory.kv_lengths):
            first_real = _sent([columns - have for have in memory.kv_lengths], device)[:, None]
            end = _sent([columns + length for length in lengths], device)[:, None]
            column = torch.arange(columns + width, device=device)[None, :]
            valid = (column >= first_real) & (column < end)
        masks = self._masks(hidden, valid, columns, position_ids)
        return hidden, Frame(position_ids, masks, self.rotary(hidden, position_ids), real, hidden, keep_keys)

    def open_single(self, input_ids: Tensor, numbers: Tensor, columns: int) -> tuple[Tensor, Frame]:
        """The same for one more token of every row of a memory with an arena; no shape depends on how many it holds.

        Args:
            input_ids: [B, 1].
            numbers: of each row, the token's position and how many keys it has; then the column that the token's
                come into. [2B + 1].
            columns: R, those of the arena.
        """
        hidden, batch = self.embed(input_ids), input_ids.shape[0]
        numbers = numbers.to(hidden.device, non_blocking=True)
        position_ids, have, place = numbers[:batch, None], numbers[batch:-1, None], numbers[-1:]
        # How far back each column is of the token.
        back = place - torch.arange(columns, device=hidden.device)
        seen = (back >= 0) & (back <= have)
        # To transformers the token stands in the last column, which sees all, and what it does not see is padding.
        past = WindowCache(columns - 1, 1, place=place)
        masks = {
            reach: self._mask(None, hidden, seen if reach is None else seen & (back < reach), past, position_ids)
            for reach in self._reaches
        }
        rotary = self.rotary(hidden, position_ids)
        return hidden, Frame(position_ids, masks, rotary, None, hidden, keep_keys=True, place=place)

    def run(self, hidden_states: Tensor, memory: Memory, frame: Frame, start: int, stop: int) -> tuple[Tensor, Memory]:
        """Layers [start, stop) and what is inserted after them."""
        width, columns, arena = hidden_states.shape[1], memory.columns, memory.arena
        if arena is not None:
            columns = arena.columns - 1
        state, kv = dict(memory.state), dict(memory.kv if arena is None else arena.kv)
        for index in range(start, stop):
            cache = WindowCache(columns, width, state.get((index, 0)), kv.get(index), frame.keep_keys, frame.place)
            hidden_states = self.layer(index, hidden_states, frame, cache)
            if (after := cache.written(hidden_states)) is not None:
                state[(index, 0)] = after
            if cache.kv is not None:
                kv[index] = cache.kv
            if (layer := self.inserted.get(index)) is not None:
                # A base that is spread over devices carries its hidden states along; nobody carries ours.
                lengths = None if frame.lengths is None else frame.lengths.to(hidden_states.device)
                if (held := state.get((index, 1))) is not None:
                    held = LayerState(*(None if part is None else part.to(hidden_states.device) for part in held))
                hidden_states, own = layer(hidden_states, held, lengths)
                state[(index, 1)] = LayerState(*own)
        if arena is None:
            return hidden_states, changed(memory, state=state, kv=kv)
        if any(pair[0] is not arena.kv[index][0] for index, pair in kv.items()):
            # In another dtype than before.
            return hidden_states, changed(memory, state=state, arena=Arena(kv, arena.columns))
        return hidden_states, changed(memory, state=state)

    def close_loop(self, hidden_states: Tensor) -> Tensor:
        """Most architectures hand the residual stream on as it is."""
        return hidden_states

    # --- one base model --------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] ids to [B, T, D]."""
        hidden = self.language_model.get_input_embeddings()(input_ids)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        return hidden if self._embedding_dropout is None else self._embedding_dropout(hidden)

    def rotary(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """Rotary tables per kind of attention layer; None where the model has none."""
        tables = self._tables
        if tables is None:
            return dict.fromkeys(self._attending_kinds)
        if self._rotary_by_kind:
            return {kind: tables(hidden_states, position_ids, kind) for kind in self._attending_kinds}
        return dict.fromkeys(self._attending_kinds, tables(hidden_states, position_ids))

    def layer(self, index: int, hidden_states: Tensor, frame: Frame, cache: WindowCache) -> Tensor:
        """Layer ``index`` of the base."""
        call = self._calls[index]
        module = self.layers._modules[call.key]
        assert module is not None
        arguments = self.layer_arguments(index, frame, cache)
        narrow: Any = self._narrow(index, arguments) if self.window is not None and call.attends else None
        if narrow is None:
            output = module(hidden_states, **arguments)
        else:
            with narrow:
                output = module(hidden_states, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def layer_arguments(self, index: int, frame: Frame, cache: WindowCache) -> dict[str, Any]:
        """Keyword arguments of a decoder layer, by transformers' names; only such as it takes."""
        call = self._calls[index]
        arguments: dict[str, Any] = {call.cache: cache}
        if "attention_mask" in call.takes:
            arguments["attention_mask"] = frame.masks[call.reach] if call.attends else None
        if "use_cache" in call.takes:
            arguments["use_cache"] = True
        # Recurrent layers take no position, but many share a signature with the attention layers beside them.
        rotary = frame.rotary.get(call.kind, next(iter(frame.rotary.values()), None))
        if rotary is None:
            if "position_ids" in call.takes:
                arguments["position_ids"] = frame.position_ids
        # Beside the tables they would say nothing, and flash attention would wait for the device to look at them.
        elif "position_embeddings" in call.takes:
            arguments["position_embeddings"] = rotary
        if "lengths" in call.takes:
            arguments["lengths"] = frame.lengths
        return arguments

    def _narrow(self, index: int, arguments: dict[str, Any]) -> Any:
        """What lets a layer under flash attention see a window's reach, which other attention reads off its mask."""
        if not self._is_flash():
            return None
        call = self._calls[index]
        if index not in self._narrowing:
            self._narrowing[index] = Narrowing(self.layers[index])
        narrowing = self._narrowing[index]
        if narrowing.by_module:
            return narrowing.to(call.reach)
        if "sliding_window" not in call.takes:
            raise UnsupportedModelError(
                f"expected layers of {type(self.language_model).__name__} to take `sliding_window`, which sliding "
                "eviction needs with flash attention; use attn_implementation='sdpa' or eviction='hard'"
            )
        arguments["sliding_window"] = call.reach
        return None

    def normed(self, hidden_states: Tensor) -> Tensor:
        """Final norm, in the precision of the head that reads it; [..., D] to [..., D]."""
        return self._normed(hidden_states, self.language_model.get_output_embeddings())

    def _normed(self, hidden_states: Tensor, head: Any) -> Tensor:
        hidden_states, dtype = self.norm(hidden_states), head.weight.dtype
        # The weight of a quantized head is stored as whole numbers, and its input is what it is.
        return hidden_states.to(dtype) if dtype.is_floating_point else hidden_states

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Final norm, head and what the family does to its logits; [..., D] to [..., V]."""
        head: Any = self.language_model.get_output_embeddings()
        logits = head(self._normed(hidden_states, head))
        for factor in self._factors:
            logits = logits * factor
        if self._divisor is not None:
            logits = logits / self._divisor
        if self._cap is not None:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits

    def base_logits(self, input_ids: Tensor) -> Tensor:
        """The base's own logits [B, T, V], by its own forward pass."""
        return self.language_model(input_ids=input_ids, use_cache=False).logits

    # --- masks -----------------------------------------------------------------------------------------------------

    def _is_flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    def _masks(self, hidden: Tensor, valid: Tensor | None, columns: int, position_ids: Tensor) -> dict[int | None, Any]:
        """A mask per reach, in the form that the attention implementation wants."""
        total = columns + hidden.shape[1]
        past = WindowCache(columns, hidden.shape[1])
        # One token sees all there is.
        bare = hidden.shape[1] == 1 and valid is None
        if bare:
            attention = self.config._attn_implementation or ""
            bare = attention in _MASK_FREE or "flash" in attention
        return {
            reach: None
            if bare and (reach is None or total < reach)
            else self._mask(reach, hidden, valid, past, position_ids)
            for reach in self._reaches
        }

    def _mask(
        self, reach: int | None, hidden: Tensor, valid: Tensor | None, past: WindowCache, position_ids: Tensor
    ) -> Any:
        arguments: dict[str, Any] = {
            "inputs_embeds": hidden,
            "attention_mask": valid,
            "past_key_values": past,
            "position_ids": position_ids,
            # Where padding is known to be, there is no need to look for it, which would wait for the device.
            "allow_is_causal_skip": valid is None,
        }
        config, create = self.config, create_causal_mask
        if reach is not None:
            config, create = copy.copy(config), create_sliding_window_causal_mask
            config.sliding_window = reach
        mask = create(config=config, **arguments)
        if isinstance(mask, Tensor) and mask.dtype == torch.float64:
            # Eager attention takes its softmax in float32, where float64's lowest number is minus infinity, and a
            # padding token that sees nothing but padding would be NaN.
            mask = mask.clamp(min=torch.finfo(torch.float32).min)
        return mask


def _sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _parameters(module: nn.Module) -> frozenset[str]:
    """Names of a module's forward parameters, with "*" if it takes any keyword."""
    # What peft trains as a whole stands behind a module that hands everything on.
    while "original_module" in module._modules:
        module = module.get_submodule("original_module")
    parameters = inspect.signature(type(module).forward).parameters.values()
    return frozenset("*" if p.kind is inspect.Parameter.VAR_KEYWORD else p.name for p in parameters)
