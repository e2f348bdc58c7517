"""What the base's own layers see as their cache while one pass over one window runs."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sleepify.errors import UnsupportedModelError
from sleepify.memory import LayerState, Memory


class WindowCache(Cache):
    """What the base's own layers see as their cache while one pass runs: it hands out a `Memory` and takes notes.

    transformers' caches copy in place, which cuts gradients and spoils snapshots; this one only replaces.
    """

    def __init__(self, memory: Memory, query_length: int, keep_keys: bool = False) -> None:
        super().__init__(layers=[])
        self.past = memory.columns
        self.query_length = query_length
        self.keep_keys = keep_keys
        self.before = memory
        self.state = dict(memory.state)
        self.kv = dict(memory.kv)
        # Older transformers reach into the layers for the state instead of asking for it.
        self.layers = _LayerViews(self)

    def memory(self) -> Memory:
        """The memory after the pass; keys are not yet counted in (`Memory.advance` does)."""
        return Memory(self.before.batch_size, self.state, self.kv, self.before.kv_lengths)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Remembered keys and values followed by the new ones, [B, H, S + T, d]."""
        if layer_idx in self.before.kv:
            keys, values = self.before.kv[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        if self.keep_keys:
            self.kv[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None:
            return any(key[1] == 0 for key in self.before.state)
        return (layer_idx, 0) in self.before.state

    def is_recording_past(self, layer_idx: int) -> bool:
        """True keeps transformers' layers off the kernel that overwrites the convolution state in place."""
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.state.get((layer_idx, 0), LayerState()).conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.before.state.get((layer_idx, 0), LayerState())
        if layer.recurrent is None or self.query_length > 1:
            return layer.recurrent
        # Single-token kernels write into the tensor they are given: give them one of their own, and keep it.
        own = layer.recurrent.clone()
        self.state[(layer_idx, 0)] = LayerState(self.state[(layer_idx, 0)].conv, own)
        return own

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        if state_idx:
            raise UnsupportedModelError("expected one convolution state per layer, found more; see docs/add-a-host")
        old = self.get_conv_state(layer_idx)
        width = conv_kernel_size or (conv_states.shape[-1] if old is None else old.shape[-1])
        full = conv_states if old is None else torch.cat([old, conv_states], -1)
        if full.shape[-1] < width:
            full = nn.functional.pad(full, (width - full.shape[-1], 0))
        recurrent = self.state.get((layer_idx, 0), LayerState()).recurrent
        self.state[(layer_idx, 0)] = LayerState(full[..., -width:], recurrent)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        wide = recurrent_states.to(torch.promote_types(recurrent_states.dtype, torch.float32))
        self.state[(layer_idx, 0)] = LayerState(self.state.get((layer_idx, 0), LayerState()).conv, wide)
        return wide


class _LayerViews(list):
    """``cache.layers[i].conv_states[0]`` and its like, by asking the cache.

    The cache is referred to weakly: in a cycle with it, its tensors would wait for Python's collector, pass after pass.
    """

    def __init__(self, cache: WindowCache) -> None:
        super().__init__()
        self.cache = weakref.proxy(cache)

    def __getitem__(self, index: Any) -> Any:
        return _LayerView(self.cache, index)


class _LayerView:
    record_past = True

    def __init__(self, cache: WindowCache, index: int) -> None:
        self.cache, self.index = cache, index

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return {0: self.cache.get_conv_state(self.index)}

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return {0: self.cache.get_recurrent_state(self.index)}
