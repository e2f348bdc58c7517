"""What one of the base's own layers sees as its cache while one pass over one window runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from sleepify.errors import UnsupportedModelError
from sleepify.memory import LayerState

_NOTHING = LayerState()


class WindowCache(Cache):
    """Hands a layer what it remembers, and takes down what it will remember.

    transformers' caches copy in place, which cuts gradients and spoils snapshots; this one only replaces. It belongs to
    one layer and does not look at the number by which the layer asks: layers that differ in nothing else then share one
    compiled graph. What is remembered may lie elsewhere or be of another precision (a session from a file, a model that
    was loaded otherwise): it is brought to where and what the layer is.

    Args:
        past: remembered positions.
        query_length: tokens of this pass.
        state: of the layer, before the pass.
        kv: its remembered keys and values, [B, H, S, d] each, if there are any.
        keep_keys: whether those of this pass are to be remembered.
        place: the column [1] of ``kv`` into which the keys and values of a single token are written, if there is room
            for them; they are remembered in any case, and what it sees is up to a mask.
    """

    # What transformers' constructor would set; one is made per layer and token, and its checks say nothing here.
    layer_class_to_replicate = None
    offloading = False

    def __init__(
        self,
        past: int,
        query_length: int,
        state: LayerState | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
        keep_keys: bool = False,
        place: Tensor | None = None,
    ) -> None:
        self.past = past
        self.query_length = query_length
        self.keep_keys = keep_keys
        self.place = place
        self.before = _NOTHING if state is None else state
        self.state = self.before
        self.kv = self._kv_before = kv
        self._lent: Tensor | None = None

    @property
    def layers(self) -> list:  # type: ignore[override]
        """What older transformers reach into for the state instead of asking for it.

        Made when asked for: stored, it and the cache would refer to each other, and tensors would wait for Python's
        collector, pass after pass.
        """
        return _LayerViews(self)

    @property
    def is_compileable(self) -> bool:
        """transformers leaves out the mask that hides nothing, except for caches that say this of themselves."""
        return self.place is not None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Remembered keys and values followed by the new ones, [B, H, S + T, d], or with them in their place."""
        if self.kv is not None and self.place is not None:
            self.kv = (_written(self.kv[0], self.place, key_states), _written(self.kv[1], self.place, value_states))
            return self.kv
        if self.kv is not None:
            keys, values = self.kv[0].to(key_states), self.kv[1].to(value_states)
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        if self.keep_keys:
            self.kv = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.past + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return any(tensor is not None for tensor in self.before)

    def is_recording_past(self, layer_idx: int) -> bool:
        """True keeps transformers' layers off the kernel that overwrites the convolution state in place."""
        return True

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.before.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        recurrent = self.before.recurrent
        if recurrent is not None and (made := self.state.conv) is not None:
            # Layers convolve before they look at their matrix.
            recurrent = recurrent.to(made.device, torch.promote_types(made.dtype, torch.float32))
        if recurrent is None or self.query_length > 1:
            return recurrent
        # Single-token code writes into the tensor it is given: give it one of its own, and keep it.
        own = recurrent.clone()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._lent = own
            return _Overwritten.of(own, self)
        self.state = LayerState(self.state.conv, own)
        return own

    def written(self, hidden_states: Tensor) -> LayerState | None:
        """The state after the pass that gave ``hidden_states``, None if the layer has none.

        Raises:
            UnsupportedModelError: if gradient is wanted and the layer wrote its state where none is recorded.
        """
        if self._lent is not None and self.state.recurrent is self.before.recurrent:
            if hidden_states.requires_grad:
                raise UnsupportedModelError(
                    "expected a recurrent layer to write its state by PyTorch where gradient is wanted, but a kernel "
                    "wrote it that records none; uninstall mamba-ssm to train with single tokens"
                )
            return LayerState(self.state.conv, self._lent)
        return None if self.state is self.before else self.state

    def left(self) -> tuple[Tensor, ...]:
        """State, keys and values that the pass has made, without those that it was given."""
        kv = () if self.kv is None or self.kv is self._kv_before else self.kv
        state = (new for new, old in zip(self.state, self.before, strict=True) if new is not old and new is not None)
        return (*state, *kv)

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
        old = None if self.before.conv is None else self.before.conv.to(conv_states)
        width = conv_kernel_size or (conv_states.shape[-1] if old is None else old.shape[-1])
        full = conv_states if old is None else torch.cat([old, conv_states], -1)
        if full.shape[-1] < width:
            full = nn.functional.pad(full, (width - full.shape[-1], 0))
        self.state = LayerState(full[..., -width:], self.state.recurrent)
        return full

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        wide = recurrent_states.to(torch.promote_types(recurrent_states.dtype, torch.float32))
        self.state = LayerState(self.state.conv, wide)
        return wide


def _written(room: Tensor, place: Tensor, new: Tensor) -> Tensor:
    """Room [B, H, R, d] with the new column [B, H, 1, d] in it; a copy only where what was read before was read in
    another precision or elsewhere.
    """
    room = room.to(new)
    room.index_copy_(2, place.to(new.device, non_blocking=True), new)
    return room


class _Overwritten(Tensor):
    """A state that is told to overwrite itself, and tells the cache of the new one instead.

    What is computed from the old state needs it in the backward pass, so it must stay as it is.
    """

    old: Tensor
    cache: WindowCache

    @classmethod
    def of(cls, state: Tensor, cache: WindowCache) -> _Overwritten:
        """``state``, whose content nobody needs but the layer that is about to read and overwrite it."""
        made = state.as_subclass(cls)
        made.old, made.cache = state, cache
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_ and isinstance(args[0], cls):
            args[0].cache.update_recurrent_state(args[1].to(args[0].old), 0)
            return args[0]
        # Without a trace of this object: saved for the backward pass, it would keep the cache and all that it holds.
        args = tuple(arg.old if isinstance(arg, cls) else arg for arg in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _LayerViews(list):
    """``cache.layers[i].conv_states[0]`` and its like, by asking the cache, whatever i."""

    def __init__(self, cache: WindowCache) -> None:
        super().__init__()
        self.cache = cache

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
