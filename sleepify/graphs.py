"""One graph for the wake token of all sessions of a batch size and room: launched as a whole, without Python.

What a token needs is brought to tensors that stay where they are, the graph is replayed on them, and what it leaves is
taken out as values: a session is as independent of the graph as of other sessions. As long as the same session reads
on, its keys and its state are still there from the token before; another one's are brought in first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sleepify.arena import Arena
from sleepify.errors import UnsupportedModelError
from sleepify.hosts import Host
from sleepify.memory import LayerKey, LayerState, Memory
from sleepify.precision import unchanged

Capture = Callable[[Callable[[], None]], Callable[[], None]]
# Graphs kept, each with the keys of a window and a state; of the one that was used least lately nothing is kept.
_MOST = 8


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """What replays, on the CUDA device, all that ``function`` launches.

    Raises:
        RuntimeError: if it waits for the device, which cannot be captured.
    """
    front, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(front)
    with torch.cuda.stream(side):
        # Libraries that are loaded and kernels that are tried out at their first use are so outside of the graph.
        for _ in range(2):
            function()
    front.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A thread that sleeps in the background may launch what it likes meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


class _State(dict[LayerKey, LayerState]):
    """The state that a graph has left, to be known again: a plain dict cannot be referred to weakly."""


class _Single:
    """In the place of a frame: numbers [2B + 1] of a token, see `Host.open_single`."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


class _Step:
    """A wake token of B rows with R columns of keys, captured.

    Args:
        blocks: the model.
        capture: makes the graph.
        input_ids: [B, 1].
        memory: of a session that the graph is to serve, with its arena.

    Attributes:
        is_stable: whether what it leaves has the dtypes of what it found; else there is no graph.
    """

    def __init__(self, blocks: Host, capture: Capture, input_ids: Tensor, memory: Memory) -> None:
        assert memory.arena is not None
        self._blocks = blocks
        self._ids = input_ids.clone()
        batch, columns = input_ids.shape[0], memory.arena.columns
        numbers = [*memory.kv_lengths, *memory.kv_lengths, memory.columns]
        self._numbers = torch.tensor(numbers).to(input_ids.device, non_blocking=True)
        self._arena = Arena(memory.arena.kv, columns)
        self._state = {
            key: LayerState(*(None if tensor is None else tensor.clone() for tensor in layer))
            for key, layer in memory.state.items()
        }
        self._memory = Memory(batch, self._state, self._arena.first(columns), (columns,) * batch, self._arena)
        self._hidden: Tensor | None = None
        # Whose keys and state are there, and how many columns.
        self._held: tuple[Any, int, Any] = (None, 0, None)
        self.is_stable = True
        self._run()
        if self.is_stable:
            self._replay = capture(self._run)

    def _run(self) -> None:
        hidden, frame = self._blocks.open_single(self._ids, self._numbers, self._arena.columns)
        self._hidden, after = self._blocks.run(hidden, self._memory, frame, 0, self._blocks.n_layers)
        self.is_stable = after.arena is self._arena and after.state.keys() == self._state.keys()
        for key, layer in self._state.items():
            for mine, new in zip(layer, after.state.get(key, layer), strict=True):
                if mine is None or new is None or mine.dtype != new.dtype:
                    self.is_stable &= mine is new
                else:
                    mine.copy_(new)

    def holds(self, memory: Memory) -> bool:
        """Whether this session read the latest token."""
        arena, columns, state = self._held
        return arena is not None and arena() is memory.arena and state() is memory.state and columns == memory.columns

    def __call__(self, input_ids: Tensor, numbers: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Hidden states [B, 1, D] and the memory after the token, its keys in the column that is this session's."""
        arena, column = memory.arena, memory.columns
        assert arena is not None and self._hidden is not None
        held, self._held = self.holds(memory), (None, 0, None)
        if not held:
            for mine, theirs in zip(self._arena.buffers, arena.buffers, strict=True):
                mine.copy_(theirs)
            for key, layer in self._state.items():
                for own, given in zip(layer, memory.state[key], strict=True):
                    if own is not None and given is not None:
                        own.copy_(given)
        self._ids.copy_(input_ids)
        self._numbers.copy_(numbers, non_blocking=True)
        self._replay()
        for mine, theirs in zip(self._arena.buffers, arena.buffers, strict=True):
            theirs.narrow(3, column, 1).copy_(mine.narrow(3, column, 1))
        state = _State(
            (key, LayerState(*(None if tensor is None else tensor.clone() for tensor in layer)))
            for key, layer in self._state.items()
        )
        self._held = ref(arena), column + 1, ref(state)
        after = Memory(memory.batch_size, state, memory.kv, memory.kv_lengths, arena)
        return self._hidden.clone(), after


class WakeGraphs:
    """A model as sleep.py's `Blocks`, in which single tokens of sessions with room are graphs.

    Args:
        blocks: the model.
        capture: makes a graph of a function.
    """

    def __init__(self, blocks: Host, capture: Capture) -> None:
        self.blocks = blocks
        self.n_layers, self.loop_range = blocks.n_layers, blocks.loop_range
        self.close_loop, self.last_writer = blocks.close_loop, blocks.last_writer
        self._capture = capture
        self._steps: dict[Any, _Step] = {}
        self._latest: _Step | None = None
        # A graph has one set of tensors, whatever threads read.
        self._lock = Lock()

    @property
    def masks_padding(self) -> bool:
        """Whether right-padded rows leave the state that each row alone leaves."""
        return self.blocks.masks_padding

    def __len__(self) -> int:
        return len(self._steps)

    def open(
        self, input_ids: Tensor, lengths: Sequence[int], positions: Sequence[int], memory: Memory, keep_keys: bool
    ) -> tuple[Tensor, Any]:
        """As `Host.open`; nothing is done yet for a token that is a graph."""
        kind = input_ids.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if memory.arena is None or autocast:
            return self.blocks.open(input_ids, lengths, positions, memory, keep_keys)
        return input_ids, _Single(torch.tensor([*positions, *memory.kv_lengths, memory.columns]))

    def run(self, hidden_states: Tensor, memory: Memory, frame: Any, start: int, stop: int) -> tuple[Tensor, Memory]:
        """As `Host.run`; for a token that is a graph ``hidden_states`` are its ids [B, 1], and all layers run."""
        if not isinstance(frame, _Single):
            return self.blocks.run(hidden_states, memory, frame, start, stop)
        with self._lock:
            step = self._step(hidden_states, memory)
            if step.is_stable:
                return step(hidden_states, frame.numbers, memory)
        assert memory.arena is not None
        hidden, whole = self.blocks.open_single(hidden_states, frame.numbers, memory.arena.columns)
        return self.blocks.run(hidden, memory, whole, start, stop)

    def _step(self, input_ids: Tensor, memory: Memory) -> _Step:
        if self._latest is not None and self._latest.holds(memory):
            return self._latest
        assert memory.arena is not None
        states = [tensor for _, layer in sorted(memory.state.items()) for tensor in layer if tensor is not None]
        key = tuple((x.shape, x.dtype, x.device) for x in (*memory.arena.buffers, *states))
        step = self._steps.pop(key, None)
        if step is None:
            try:
                # Tensors that stay must not be those of an inference mode, which ends.
                with torch.inference_mode(False), torch.no_grad():
                    step = _Step(self.blocks, self._capture, input_ids, memory)
            except RuntimeError as error:
                raise UnsupportedModelError(
                    "expected a wake token that can be captured as a graph, but a layer of "
                    f"{type(self.blocks.language_model).__name__} waits for the device or moves data to it ({error}); "
                    "read without `model.captured()`"
                ) from error
        self._steps[key] = self._latest = step
        if len(self._steps) > _MOST:
            del self._steps[next(iter(self._steps))]
        return step


class SleepCapture:
    """``model.captured()``."""

    _capture: Capture | None
    _graphs: WakeGraphs | None
    training: bool

    @contextmanager
    def captured(self, capture: Capture = cuda_graph) -> Iterator[None]:
        """Within it, single tokens of sessions with ``fixed_shapes`` are replayed as one graph, in evaluation.

        A graph is captured at the second token of a window, for a batch size and a number of columns, and serves all
        sessions of both. It holds the addresses of the weights: within, they may be overwritten, but must not be moved
        or replaced, nor adapters switched. Inserted layers of a half-precision base hold a cast of theirs, which
        `generate` brings up to date, and a call of the model itself does not.

        Args:
            capture: makes of a function one that replays what the function launches; CUDA graphs by default.

        Raises:
            ValueError: without a CUDA device, or for attention other than PyTorch's own ("sdpa").
            UnsupportedModelError: in the call that first reads a token, if the base's layers wait for the device.
        """
        model: Any = self
        attention = model.language_model.config._attn_implementation
        if attention != "sdpa":
            raise ValueError(
                f'expected attn_implementation="sdpa" to capture graphs, got {attention!r}, which looks at masks or '
                "makes them on the host"
            )
        devices = {parameter.device for parameter in model.parameters()}
        if len(devices) > 1 or (capture is cuda_graph and next(iter(devices)).type != "cuda"):
            found = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"expected a model on one CUDA device to capture graphs, got one on {found}")
        before, self._capture = self._capture, capture
        try:
            with unchanged(model):
                yield
        finally:
            self._capture, self._graphs = before, None

    def _waking(self, blocks: Host) -> Host | WakeGraphs:
        """What reads awake: the model itself, or its graphs."""
        if self._capture is None or self.training:
            return blocks
        if self._graphs is None or self._graphs.blocks is not blocks:
            self._graphs = WakeGraphs(blocks, self._capture)
        return self._graphs
