"""What is in the state: how far each pass moves it, what can be read off it linearly, and what the model recalls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleepify.convergence import layer_step_sizes
from sleepify.generation import left_padded
from sleepify.memory import LayerKey, Memory
from sleepify.modeling import SleepForCausalLM
from sleepify.recording import Slept, recorded
from sleepify.rows import NO_COLUMNS
from sleepify.settings import check_positive


@dataclass(frozen=True)
class PassSteps:
    """How far each pass of M sleeps moved the state.

    Attributes:
        layers: (i, 0) is layer i of the base, (i, 1) the one inserted after it; D of them are looped and keep a state.
        row, window: of each sleep, [M].
        sizes: ||S_n - S_(n-1)|| / ||S_n||, [N, D, M] float64.
    """

    layers: tuple[LayerKey, ...]
    row: Tensor
    window: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Recall:
    """How much of evicted windows a model recalls.

    Attributes:
        passes: of the last sleep.
        accuracy: share of the tokens that are the first choice, given those of their window before them, [passes, W]
            float64; the age of a window in windows is its column, the latest being 0.
        without: the same with no state, [W]: what the window tells of itself.
    """

    passes: tuple[int, ...]
    accuracy: Tensor
    without: Tensor


def pass_steps(
    model: SleepForCausalLM, rows: Sequence[Sequence[int]], *, n_loops: int | None = None, batch_size: int = 64
) -> PassSteps:
    """How far each pass of every sleep moves the state of every looped layer.

    Args:
        model: which sleeps.
        rows: ids.
        n_loops: N; by default the model's.
        batch_size: rows at a time.

    Raises:
        ValueError: if nothing sleeps, since no row is longer than a window.
    """
    loop_range = model.options().loop_range
    slept = _sleeps(model, rows, n_loops, batch_size)
    chains = [list(zip(each.memories, each.memories[1:], strict=False)) for each in slept]
    steps = [[layer_step_sizes(*pair, loop_range) for pair in chain] for chain in chains]
    layers = tuple(sorted(steps[0][0]))
    sizes = [[[float(step[layer]) for layer in layers] for step in chain] for chain in steps]
    row, window = (torch.tensor(values) for values in zip(*((each.row, each.window) for each in slept), strict=True))
    return PassSteps(layers, row, window, torch.tensor(sizes, dtype=torch.float64).permute(1, 2, 0))


def state_features(
    model: SleepForCausalLM, rows: Sequence[Sequence[int]], *, n_loops: int | None = None, batch_size: int = 64
) -> Tensor:
    """The matrix states after every pass of each row's last sleep, as vectors [N, R, F] float64 for `linear_probe`.

    Args:
        model: which sleeps.
        rows: R rows of ids, each longer than a window.
        n_loops: N; by default the model's.
        batch_size: rows at a time.

    Raises:
        ValueError: for a row in which nothing sleeps.
    """
    last = {each.row: each for each in _sleeps(model, rows, n_loops, batch_size)}
    if missing := [row for row in range(len(rows)) if row not in last]:
        raise ValueError(f"expected rows longer than a window, got shorter ones at {missing[:5]}; leave them out")
    chains = [[_vector(memory) for memory in last[row].memories[1:]] for row in range(len(rows))]
    return torch.stack([torch.stack(chain) for chain in chains], 1)


def ridge(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Linear regression in closed form: weights and bias that minimise ||X W + b - Y||^2 + penalty ||W||^2.

    Args:
        features: X, [R, F].
        targets: Y, [R, C].
        penalty: above 0.

    Returns:
        W [F, C] and b [C], float64.

    Raises:
        ValueError: for a penalty that is not above 0.
    """
    if not penalty > 0:
        raise ValueError(f"expected penalty above 0, got {penalty!r}")
    x, y = features.double(), targets.double()
    middle, mean = x.mean(0), y.mean(0)
    x, y = x - middle, y - mean
    small = min(x.shape)
    eye = penalty * torch.eye(small, dtype=x.dtype, device=x.device)
    # The same weights from R or from F equations, whichever are fewer.
    if x.shape[0] == small:
        weight = x.T @ torch.linalg.solve(x @ x.T + eye, y)
    else:
        weight = torch.linalg.solve(x.T @ x + eye, x.T @ y)
    return weight, mean - middle @ weight


def linear_probe(features: Tensor, targets: Tensor, *, held_out: int, penalty: float = 1e-2) -> Tensor:
    """How well tokens can be read off the state by a linear map: accuracy on rows that it was not fitted on.

    Args:
        features: of every row, [R, F].
        targets: P tokens per row, [R, P].
        held_out: rows to test on, the last ones; the map is fitted on the others.
        penalty: of `ridge`, as a multiple of the mean squared length of a centred row.

    Returns:
        [P] float64.

    Raises:
        ValueError: for too few rows to hold out so many.
    """
    check_positive("held_out", held_out)
    known = features.shape[0] - held_out
    if known < 2 or targets.shape[0] != features.shape[0]:
        raise ValueError(
            f"expected targets of every row and two rows to fit on beside {held_out} held out, got features of "
            f"{features.shape[0]} and targets of {targets.shape[0]} rows"
        )
    x = features.double()
    length = (x[:known] - x[:known].mean(0)).square().sum(1).mean()
    classes, labels = targets.unique(return_inverse=True)
    wanted = torch.nn.functional.one_hot(labels, len(classes)).double().to(x.device)
    weight, bias = ridge(x[:known], wanted[:known].flatten(1), float(penalty * length))
    guess = (x[known:] @ weight + bias).unflatten(1, wanted.shape[1:]).argmax(-1)
    return (guess == labels[known:].to(guess.device)).double().mean(0)


@torch.no_grad()
def recall(
    model: SleepForCausalLM, rows: Sequence[Sequence[int]], passes: Sequence[int], *, batch_size: int = 64
) -> Recall:
    """How many tokens of evicted windows a model predicts when it reads the window again, by age and by pass.

    All windows of a row are slept on, the last with m passes, those before with the model's N. Then each is read again
    from that same state, all but its last token, and each token is predicted from those before it.

    Args:
        model: which sleeps, with hard eviction.
        rows: ids of W whole windows each.
        passes: m to compare.
        batch_size: rows at a time.

    Raises:
        ValueError: for rows that are not W whole windows, a window of one token, or sliding eviction, under which the
            keys of the latest window are not evicted.
    """
    settings = model.options()
    size, lengths = settings.window_size, {len(row) for row in rows}
    if settings.sliding:
        raise ValueError("expected a model with hard eviction, got sliding eviction, which keeps keys of each window")
    if len(lengths) != 1 or max(lengths) % size or not max(lengths) or size < 2:
        raise ValueError(f"expected rows of equally many whole windows of {size} tokens, got {sorted(lengths)}")
    check_positive("batch_size", batch_size)
    n_windows = max(lengths) // size
    right = torch.zeros(len(passes), n_windows, dtype=torch.float64)
    without = torch.zeros(n_windows, dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            ids = torch.tensor([list(row) for row in rows[first : first + batch_size]], device=model.device)
            cache = model(ids, use_cache=True, logits_to_keep=NO_COLUMNS).past_key_values
            for age, window in enumerate(reversed(ids.split(size, 1))):
                again, wanted = window[:, :-1], window[:, 1:]
                without[age] += (model(again, use_cache=False).logits.argmax(-1) == wanted).sum().cpu()
                for place, m in enumerate(passes):
                    chosen = model(again, past_key_values=cache.clone(), n_loops=m).logits.argmax(-1)
                    right[place, age] += (chosen == wanted).sum().cpu()
    finally:
        model.train(was_training)
    count = len(rows) * (size - 1)
    return Recall(tuple(passes), right / count, without / count)


def _sleeps(
    model: SleepForCausalLM, rows: Sequence[Sequence[int]], n_loops: int | None, batch_size: int
) -> list[Slept]:
    """Every sleep that reading these rows takes; the row is that among all of them."""
    check_positive("batch_size", batch_size)
    found = []
    for first in range(0, len(rows), batch_size):
        texts = [torch.tensor(list(row), device=model.device) for row in rows[first : first + batch_size]]
        ids, mask = left_padded(texts)
        with recorded(model) as slept:
            model(ids, attention_mask=mask, use_cache=True, n_loops=n_loops, logits_to_keep=NO_COLUMNS)
        found += [Slept(first + each.row, each.window, each.memories) for each in slept]
    if not found:
        raise ValueError(f"expected rows longer than a window of {model.options().window_size} tokens, got none")
    return found


def _vector(memory: Memory) -> Tensor:
    """The matrix states of all layers, one after the other, [F] float64."""
    states = (layer.recurrent for _, layer in sorted(memory.state.items()))
    return torch.cat([state.flatten().double() for state in states if state is not None])
