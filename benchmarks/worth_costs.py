"""What an arm of `benchmarks.worth` costs once trained: operations to read, bytes held, time of one more token."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from sleepify import SleepCache, SleepForCausalLM
from sleepify.files import written_beside

REPEATS = 30


@dataclass(frozen=True)
class Cost:
    """Of one row, at the moment when the question comes.

    Args:
        tokens: read so far.
        operations: floating point operations of matrix products to read them and one token more, sleep included.
        cache_bytes: held of keys and values.
        state_bytes: held of recurrent states.
        token_seconds: processor time of one more token, the least of some.
    """

    tokens: int
    operations: int
    cache_bytes: int
    state_bytes: int
    token_seconds: float


@torch.no_grad()
def measure(folder: Path, text: list[int]) -> Cost:
    """A saved model that reads a text, and then one token more.

    Args:
        folder: of the model.
        text: the ids before the question.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([text])
    sleeps = isinstance(model, SleepForCausalLM)
    cache: SleepCache | DynamicCache = SleepCache() if sleeps else DynamicCache(config=model.config)
    with FlopCounterMode(display=False) as counter:
        # A full window is slept on when the next token comes.
        model(torch.cat((ids, ids[:, :1]), 1), use_cache=True, logits_to_keep=1)
    model(ids, past_key_values=cache, logits_to_keep=1)
    if isinstance(cache, SleepCache):
        model.sleep(cache)
    if isinstance(cache, SleepCache):
        cache_bytes, state_bytes = cache.kv_bytes, cache.state_bytes
    else:
        cache_bytes, state_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 0
    seconds = []
    for _ in range(REPEATS):
        once = cache.clone() if isinstance(cache, SleepCache) else copy.deepcopy(cache)
        begin = time.process_time()
        model(ids[:, :1], past_key_values=once, logits_to_keep=1)
        seconds.append(time.process_time() - begin)
    return Cost(len(text), counter.get_total_flops(), cache_bytes, state_bytes, min(seconds))


def write(costs: dict[str, Cost], path: Path) -> None:
    """By arm, as one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(path) as draft:
        draft.write_text(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=2) + "\n")


def read(path: Path) -> dict[str, Cost]:
    """What `write` wrote; nothing where there is no file."""
    fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: Cost(**cost) for name, cost in fields.items()}
