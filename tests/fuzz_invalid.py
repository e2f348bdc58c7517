"""Calls that must be refused, on sessions of random programs: the other half of test_fuzz.py.

A refused call says what was expected and what came, as ValueError or TypeError, and leaves the session bit for bit as
it was. So does a call that is broken off half way by something else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache as remembered
from typing import Any

import torch
from families import VOCAB, tiny_base
from fuzz import CALLS_PER_PROGRAM, IGNORE, Program, Row, Session
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList

from sleepify import FastWeightConfig, SleepCache, sleepify
from sleepify.arena import Arena

# Every refusal says these: what was expected, and what came instead.
# transformers refuses assisted generation in words of its own.
SAYS = re.compile(r"expected .*(, got |, found |, but |, rows )|assist", re.DOTALL)
NAN, INF = float("nan"), float("inf")


class BrokenOff(Exception):
    """What a hook raises in the middle of a call."""


@remembered
def foreign() -> SleepCache:
    """A session of another model, of three rows."""
    model = sleepify(tiny_base("qwen2", hidden_size=16), window_size=7, fast_weights=FastWeightConfig(layers=[1]))
    return model(torch.full((3, 4), 5)).past_key_values


def same(one: Any, other: Any) -> bool:
    """Whether two values hold the same bits."""
    if isinstance(one, Tensor):
        fits = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return fits and torch.equal(one, other) and one.requires_grad == other.requires_grad
    if is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))
    if isinstance(one, Arena):
        # Room that snapshots share: what one of them holds of it is in its keys and values.
        return isinstance(other, Arena)
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(left, right) for left, right in zip(one, other, strict=True))
    return bool(one == other)


class InvalidCalls:
    """Random refused calls on the sessions of a program.

    Args:
        program: draws, and makes the valid calls in between.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.random, self.model = program, program.random, program.model
        self.n_refused = 0

    def run(self, n_calls: int = CALLS_PER_PROGRAM) -> int:
        """So many; raises at the first that is accepted, moves a session, or fails otherwise. Returns their number."""
        kinds = [self.arguments, self.arguments, self.sleeping, self.handling, self.generating, self.settings]
        kinds += [self.broken_off]
        try:
            for _ in range(self.random.randint(1, 4)):
                getattr(self.program, self.random.choice(["read", "read", "generate", "rewind"]))()
            while self.n_refused < n_calls:
                session = self.program.begun()
                if self.random.random() < 0.1:
                    rows = [Row(self.model) for _ in session.rows]
                    session = Session(SleepCache(fixed_shapes=self.program.chance(0.5)), rows)
                self.random.choice(kinds)(session)
                self.n_refused += 1
            self.program.read()
            self.program.log.append("at the end")
            self.program.check()
        except (Exception, KeyboardInterrupt) as error:
            words = [self.program.name, *self.program.log, f"{type(error).__name__}: {error}"]
            raise AssertionError("\n".join(words)) from error
        return self.n_refused

    def refused(
        self, session: Session, what: str, call: Callable[[], Any], broken_by: type[BaseException] | None = None
    ) -> None:
        """See that a call fails as it should and that the session does not notice."""
        self.program.say("invalid:", what)
        before, kept = session.cache.now, copy.deepcopy(session.cache.now)
        fixed = session.cache.fixed_shapes
        mode = self.model.training
        try:
            answer = call()
        except (ValueError, TypeError) as error:
            assert broken_by is None, f"{what}: expected {broken_by} to come through, got {error!r}"
            assert SAYS.search(str(error)), f"{what}: expected words, got {type(error).__name__}: {error}"
        except BaseException as error:
            assert broken_by is not None and isinstance(error, broken_by), f"{what}: raised {error!r}"
        else:
            raise AssertionError(f"{what}: accepted, with {answer!r}")
        assert self.model.training == mode and session.cache.fixed_shapes == fixed
        now = session.cache.now
        assert (now is None) == (before is None), f"{what}: the session is bound or lost"
        assert now is None or same(now, kept), f"{what}: the session has moved"

    # --- kinds of calls --------------------------------------------------------------------------------------------

    def ids(self, session: Session, width: int | None = None) -> Tensor:
        width = width or self.random.randint(1, 2 * self.program.size + 2)
        return torch.tensor([[self.random.randrange(3, VOCAB) for _ in range(width)] for _ in session.rows])

    def arguments(self, session: Session) -> None:
        """Of `forward`, one of them wrong."""
        ids = self.ids(session)
        wrong = self.wrong_ids(ids) + self.wrong_masks(ids, session) + self.wrong_others(ids)
        name, value = self.random.choice(wrong)
        keywords = {"input_ids": ids, "past_key_values": session.cache} | {name: value}
        if name == "num_items_in_batch":
            keywords["labels"] = ids
        elif name not in ("labels", "logits_to_keep") and self.program.chance(0.3):
            keywords["labels"] = ids
        without = self.program.chance(0.15) and not (name == "attention_mask" and "session" in str(value))
        self.refused(session, f"forward({name}={value!r}) of {tuple(ids.shape)}", lambda: self.model(**keywords))
        if without and name not in ("past_key_values", "attention_mask", "input_ids"):
            keywords.pop("past_key_values")
            self.refused(session, f"forward({name}={value!r}), no session", lambda: self.model(**keywords))

    def wrong_ids(self, ids: Tensor) -> list[tuple[str, Any]]:
        batch = ids.shape[0]
        values = [
            ids.float(), ids > 9, ids.to(torch.complex64), ids[0], ids[None], ids[:, :0], ids[:0], ids.tolist(),
            ids.numpy(), None, "text", ids - VOCAB, ids + VOCAB, torch.where(ids == ids[-1, -1], -1, ids),
            torch.where(ids == ids[0, 0], 2**40, ids), ids.repeat(batch + 1, 1), torch.tensor(3),
        ]  # fmt: skip
        return [("input_ids", value) for value in values]

    def wrong_masks(self, ids: Tensor, session: Session) -> list[tuple[str, Any]]:
        ones, past = torch.ones_like(ids), session.cache.get_seq_length()
        one = ones.clone()
        one[-1, self.random.randrange(ids.shape[1])] = self.random.choice([2, -1, 7])
        part = ones.float()
        part[0, 0] = self.random.choice([NAN, INF, -INF, 0.5, -1e9])
        hidden = torch.full(ids.shape, torch.finfo(torch.float32).min)
        hidden[:, -1] = 0
        values = [
            one, part, hidden, torch.zeros(ids.shape), ones.tolist(), ones.numpy(), "ones", ones[0], ones[None],
            torch.ones(ids.shape[0], ids.shape[1] + past + 1), ones.repeat(2, 1), ones[:, :, None], ones[:, :0],
            ones[:, None, None] > 0,
        ]  # fmt: skip
        if ids.shape[1] > 1:
            right = ones.clone()
            right[self.random.randrange(len(session.rows)), -1] = 0
            values += [right, right.bool(), right.float()]
        return [("attention_mask", value) for value in values]

    def wrong_others(self, ids: Tensor) -> list[tuple[str, Any]]:
        width = ids.shape[1]
        values: dict[str, list[Any]] = {
            "labels": [
                ids.float(), ids[:, 1:], ids + VOCAB, torch.where(ids == ids[0, 0], -1, ids), ids.tolist(), ids > 9,
                ids[0], torch.where(ids == ids[0, 0], -101, IGNORE), "labels",
            ],
            "logits_to_keep": [
                -1, True, 2.5, "all", [0], ids.float()[0], torch.tensor([[0]]), torch.tensor([width]),
                torch.tensor([-width - 1]), torch.ones(width + 1, dtype=torch.bool), torch.tensor([NAN]),
            ],
            "num_items_in_batch": [
                0, -1, NAN, torch.tensor(0), torch.tensor(NAN), torch.tensor([1, 2]), "many", 0.0, [3], INF,
            ],
            "awake": [ids, ids[:, 1:] > 3, (ids > 3).tolist(), ids.float(), True, "all", (ids > 3)[0]],
            "past_key_values": [DynamicCache(), copy.copy(foreign()), "cache", (), 3, [(ids, ids)]],
            "n_loops": [0, -1, 1.5, True, "2", torch.tensor(2), [2], NAN],
            "inputs_embeds": [torch.zeros(*ids.shape, 32)],
            "output_attentions": [True],
            "output_hidden_states": [True],
        }  # fmt: skip
        return [(name, value) for name, some in values.items() for value in some]

    def sleeping(self, session: Session) -> None:
        """`sleep` of what is no session, on rows that there are not, with no N."""
        batch = len(session.rows)
        if self.program.chance(0.3) or session.cache.now is None:
            value = self.random.choice([None, SleepCache(), copy.copy(foreign()), DynamicCache(), "cache", 3])
            self.refused(session, f"sleep({value!r})", lambda: self.model.sleep(value))
            return
        rows: list[Any] = [
            [batch], [-1], [0, 0], [True], ["0"], [0.0], 0, 1.5, "0", torch.tensor(0), torch.tensor([0.0]), [None],
            [[0]], {"row": 0}, torch.tensor([batch]), True,
        ]  # fmt: skip
        name, value = self.random.choice(
            [("rows", each) for each in rows] + [("n_loops", each) for each in (0, -1, 1.5, True, "3", [1])]
        )
        self.refused(session, f"sleep({name}={value!r})", lambda: self.model.sleep(session.cache, **{name: value}))

    def handling(self, session: Session) -> None:
        """Methods of the session itself."""
        cache, batch = session.cache, len(session.rows)
        most = [len(row.open) + len(row.pending) for row in session.rows]
        over = [0] * batch
        over[self.random.randrange(batch)] = max(most) + 1
        counts: list[Any] = [
            min(most) + 1, over, -1, "1", 1.5, [0.5] * batch, [True] * batch, True, None, [None] * batch,
            torch.tensor(0.5), [-1] * batch,
        ]  # fmt: skip
        crops: list[Any] = [-max(most) - 1, "a", 1.5, None, True, [1], NAN]
        picks: list[Any] = [
            [0.0], torch.tensor([0.5]), "0", None, torch.tensor([[0]]), torch.tensor(0), 0, ["0"], [None],
        ]  # fmt: skip
        orders: list[Any] = [torch.tensor([0.5]), None]
        if cache.now is not None:
            # One that has read nothing has no rows yet that there could be too many of.
            picks += [[batch], [-batch - 1], [], [True] * (batch + 1), [False] * batch]
            picks += [torch.zeros(batch + 1, dtype=torch.bool)]
            orders += [torch.tensor([batch])]
            counts += [[], [0] * (batch + 1)]
            crops += [0] * (cache.get_seq_length() > min(most))
        calls: list[tuple[str, Callable[[Any], Any], list[Any]]] = [
            ("rewind", cache.rewind, counts),
            ("crop", cache.crop, crops),
            ("batch_select_indices", cache.batch_select_indices, picks),
            ("reorder_cache", cache.reorder_cache, orders),
            ("batch_repeat_interleave", cache.batch_repeat_interleave, [0, -1, 1.5, "2", None, True]),
            ("join", SleepCache.join, [[], [cache, SleepCache()], [cache, foreign()], [cache, None], None, cache]),
            ("to", lambda dtype: cache.to(dtype=dtype), [torch.float16, torch.bfloat16]),
        ]
        name, call, values = self.random.choice(calls)
        value = self.random.choice(values)
        self.refused(session, f"{name}({value!r}) of {cache!r}, at most {most}", lambda: call(value))

    def generating(self, session: Session) -> None:
        """`generate` with a session."""
        ids = self.ids(session)
        ones = torch.ones_like(ids)
        right = torch.cat([ones, torch.zeros_like(ids[:, :1])], 1)
        longer = torch.cat([ids, ids[:, :1]], 1)
        wrong: list[dict[str, Any]] = [
            {"n_loops": 0}, {"n_loops": 1.5}, {"inputs": ids - VOCAB}, {"inputs": ids + VOCAB},
            {"inputs": longer, "attention_mask": right}, {"attention_mask": 2 * ones},
            {"attention_mask": ones * NAN}, {"past_key_values": DynamicCache()},
            {"past_key_values": copy.copy(foreign())}, {"cache_implementation": "quantized"},
            {"prompt_lookup_num_tokens": 2},
            {"assistant_model": self.model}, {"inputs": ids.tolist()}, {"inputs": ids.float()}, {"n_loops": "2"},
            {"attention_mask": torch.zeros_like(ids)}, {"attention_mask": ones.tolist()},
        ]  # fmt: skip
        if len(session.rows) > 1:
            one_row = torch.ones_like(ids)
            one_row[0] = 0
            wrong.append({"attention_mask": one_row})
        if session.cache.now is not None:
            wrong.append({"inputs": ids.repeat(2, 1)})
            other = [torch.tensor([(id_ + 1) % VOCAB for id_ in row.text] + [5]) for row in session.rows]
            if all(row.text for row in session.rows) and len({len(row) for row in other}) == 1:
                wrong.append({"inputs": torch.stack(other), "new_tokens": False})
            if any(len(row.text) - len(row.pending) for row in session.rows):
                wrong.append({"inputs": ids[:, :1] * 0 + 1, "new_tokens": False})
        keywords = self.random.choice(wrong)
        arguments = {"inputs": ids, "past_key_values": session.cache, "max_new_tokens": 4, "do_sample": False}
        arguments |= {"new_tokens": True, "eos_token_id": None} | keywords
        self.refused(session, f"generate({keywords})", lambda: self.model.generate(**arguments))

    def settings(self, session: Session) -> None:
        """On the live configuration, noticed by the next call, whichever it is."""
        config = self.model.config
        now = [bounds for bounds in [[2, 1], [0, 99], [1, 1], [-1, 2], [0], "01", 3, [0.0, 1.0], [True, 2], [0, 1, 2]]]
        values: dict[str, list[Any]] = {
            "n_loops": [0, -1, 1.5, True, "2", None, NAN],
            "window_size": [10**6, 0, -1, 2.5, True, "4"],
            "eviction": ["slidng", "", None, True, 1],
            "checkpoint": ["windows", None, True, 0],
            "loop_range": now,
            "backprop_loops": [0, -1, 1.5, True, "1"],
            "backprop_windows": [0, -1, 1.5, True, "1"],
            "offload": [1, "yes", None],
            "check_finite": [1, "yes", None],
            "fast_weights": [None, FastWeightConfig(layers=[3]), FastWeightConfig(rule="mamba2", layers=[0]), "gdn"],
        }
        if session.cache.now is not None:
            # Valid for the model, but not for a session that began otherwise.
            values["window_size"] += [self.program.size + 1]
            values["eviction"] += [{"hard": "sliding", "sliding": "hard"}[config.eviction]]
        name = self.random.choice(list(values))
        value, ids = self.random.choice(values[name]), self.ids(session)
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: self.model(ids, past_key_values=session.cache),
            "generate": lambda: self.model.generate(
                ids, past_key_values=session.cache, new_tokens=True, max_new_tokens=3, do_sample=False
            ),
            "options": lambda: self.model.options(),
        }
        if session.cache.now is not None:
            calls["sleep"] = lambda: self.model.sleep(session.cache)
            if name in ("window_size", "eviction"):
                del calls["options"]
        which, before = self.random.choice(list(calls)), getattr(config, name)
        setattr(config, name, value)
        try:
            self.refused(session, f"{which} with config.{name}={value!r}", calls[which])
        finally:
            setattr(config, name, before)

    def broken_off(self, session: Session) -> None:
        """By a layer, a watcher, a stopping criterion or a streamer, some way into the call."""
        kind = self.random.choice([BrokenOff, KeyboardInterrupt, MemoryError, SystemExit])
        ids, after = self.ids(session, self.program.size + self.random.randint(2, 5)), self.random.randint(1, 2)
        seen = [0]

        def breaks(*_: Any, **__: Any) -> None:
            seen[0] += 1
            if seen[0] == after:
                raise kind("half way")

        start, stop = self.model.options().loop_range
        layer = self.model.blocks.layers[self.random.randrange(start, stop)]
        if len(self.model.fast_weights) and self.program.chance(0.3):
            layer = self.random.choice(list(self.model.fast_weights))
        way = self.random.choice(["layer", "layer", "watch", "criterion", "streamer"])
        made = {"inputs": ids, "past_key_values": session.cache, "new_tokens": True, "max_new_tokens": 3}
        made |= {"do_sample": False, "eos_token_id": None}
        call: Callable[[], Any]
        if way in ("criterion", "streamer"):
            made |= self.breaking(way, breaks, session)
            after = 1 if way == "streamer" else after
            call = lambda: self.model.generate(**made)  # noqa: E731
        elif self.program.chance(0.3):
            call = lambda: self.model.generate(**made)  # noqa: E731
        else:
            call = lambda: self.model(ids, past_key_values=session.cache)  # noqa: E731
        after = 1 if way == "watch" else after
        hook = layer.register_forward_hook(breaks) if way == "layer" else None
        watched, self.model.watch = self.model.watch, breaks if way == "watch" else None
        try:
            self.refused(session, f"{kind.__name__} by {way} after {after}", call, kind)
        finally:
            self.model.watch = watched
            if hook is not None:
                hook.remove()

    def breaking(self, way: str, breaks: Callable[..., None], session: Session) -> dict[str, Any]:
        """What of `generate` calls ``breaks``."""
        if way == "criterion":

            def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
                breaks()
                return torch.zeros(len(input_ids), dtype=torch.bool)

            return {"stopping_criteria": StoppingCriteriaList([criterion])}

        class Streamer:
            put = staticmethod(breaks)
            end = staticmethod(lambda: None)

        return {"streamer": Streamer()} if len(session.rows) == 1 else self.breaking("criterion", breaks, session)


def refusals(seed: int, n_calls: int = CALLS_PER_PROGRAM, family: str | None = None) -> int:
    """As many invalid calls on a program of this seed; their number."""
    return InvalidCalls(Program(seed, family)).run(n_calls)
