"""Generation with a session: what of a prompt is new, and what none of its rows has read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from sleepify.cache import SleepCache
from sleepify.ended import Ended
from sleepify.packing import Marks
from sleepify.precision import unchanged
from sleepify.rows import Rows

# Tokens of an answer where neither the caller nor the model's generation config says how many, and what transformers
# takes there.
ANSWER, _UNSAID = 256, 20
_OURS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "past_key_values",
    "new_tokens",
    "tokenizer",
    "return_dict_in_generate",
)


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids [n] as one batch [B, T], padded on the left, and its mask."""
    ids = torch.nn.utils.rnn.pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).flip(1)
    return ids, mask


def answer_keywords(given: dict[str, Any], config: Any, pad: int | None) -> dict[str, Any]:
    """A user's keywords for ``generate``, where prompt and session are not the user's to choose; with a limit.

    Args:
        given: the keywords.
        config: the model's generation config.
        pad: the tokenizer's token for padding.

    Raises:
        ValueError: for what would choose them, or more than one answer to a prompt.
    """
    if own := [name for name in _OURS if name in given]:
        raise ValueError(f"expected keywords of generate other than {', '.join(_OURS)}, got {own}")
    config = given.get("generation_config") or config
    said = {name: given.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")}
    if any(value not in (None, 1) for value in said.values()):
        raise ValueError(f"expected one answer to a question, sampled or greedy, got {said}; ask a list of questions")
    limits = [given.get(name) or getattr(config, name, None) for name in ("max_new_tokens", "max_length")]
    keywords = dict(given)
    if limits[0] is None and limits[1] in (None, _UNSAID):
        keywords["max_new_tokens"] = ANSWER
    if pad is not None and given.get("pad_token_id") is None and getattr(config, "pad_token_id", None) is None:
        keywords["pad_token_id"] = pad
    return keywords


class SleepGeneration(GenerationMixin):
    """``generate`` of a model that sleeps: transformers' own, around a `SleepCache`."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a session that is handed over is moved forward as a whole, or not at all if this fails.

        Args:
            args, kwargs: those of ``GenerationMixin.generate``, any keyword of `forward` (``n_loops``), and
            new_tokens: with ``past_key_values``, ``inputs`` are only what is new in the conversation, not all of it.
            ephemeral: [B, T] bool, tokens of the prompt that are read awake and never consolidated, see `forward`. What
                is made after them is ordinary: it saw them, and is slept on for what it says. Whole conversations that
                are handed over do not contain them.
        """
        cache = kwargs.get("past_key_values")
        if not isinstance(new := kwargs.get("new_tokens", False), bool):
            raise TypeError(f"expected new_tokens to be True or False, got {new!r}")
        self._check_marks(args[0] if args else kwargs.get("inputs", kwargs.get("input_ids")), cache, kwargs)
        before = cache.now if isinstance(cache, SleepCache) else None
        given = {"inputs": args[0] if args else kwargs.get("inputs"), "attention_mask": kwargs.get("attention_mask")}
        for name, value in (given | {"input_ids": kwargs.get("input_ids")}).items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"expected {name} to be a tensor [batch, tokens], got {type(value).__name__}")
        model: Any = self
        try:
            with unchanged(model):
                return super().generate(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            if isinstance(cache, SleepCache):
                cache.now = before
            raise

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """What ``generate_batch`` and servers of transformers begin with.

        Raises:
            ValueError: always: it shares out keys by pages, and knows nothing of states.
        """
        raise ValueError(
            "expected generate() with a batch of prompts, got continuous batching (generate_batch, "
            "use_transformers_continuous_batching), which shares out keys and knows nothing of states; for many "
            "requests at once, run `sleepify serve`"
        )

    def _check_marks(self, ids: Any, cache: Any, kwargs: dict[str, Any]) -> None:
        """See that the prompt's positions and types say what is so anyway, and take them out: no step needs them."""
        marks = Marks(**{name: kwargs.pop(name, None) for name in ("position_ids", "cache_position", "token_type_ids")})
        if marks == Marks():
            return
        config: Any = self.config  # type: ignore[attr-defined]
        past = seen = None
        if isinstance(cache, SleepCache) and kwargs.get("new_tokens"):
            past, seen = cache.get_seq_length(), cache.text_lengths()
        vocabulary, mask = config.text_config.vocab_size, kwargs.get("attention_mask")
        if Rows.of(ids, mask, None, None, None, vocabulary, past, marks, seen).packed:
            raise ValueError("expected one text per row to go on with, got position_ids that begin at 0 again")

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, SleepCache):
            raise ValueError(f"expected past_key_values to be a SleepCache, got {type(given).__name__}")
        if (kind := generation_config.cache_implementation) not in (None, "static"):
            raise ValueError(
                f"expected cache_implementation=None or 'static', got {kind!r}: a sleeping model has its own SleepCache"
            )
        if given is not None and generation_config.num_beams not in (None, 1):
            raise ValueError(
                f"expected num_beams=1 with a SleepCache, got {generation_config.num_beams}: a session goes on with "
                "one text a row, and would be left in the middle of several; leave past_key_values out"
            )
        if given is not None:
            # Trained checkpoints often say that there is none; a session that was handed over is one.
            generation_config.use_cache = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SleepCache(fixed_shapes=kind == "static")

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """Read what of the prompt the session has not read; in one call, which goes window by window itself."""
        arguments = dict(model_kwargs)
        cache, only_new = arguments.get("past_key_values"), arguments.pop("new_tokens", False)
        if cache is not None:
            mask = arguments.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
            if cache.now is not None and not only_new:
                cache.wait()
                if arguments.get("ephemeral") is not None:
                    raise ValueError(
                        "expected new_tokens=True with ephemeral tokens and a session that has read something, got a "
                        "whole conversation, of which they are no part"
                    )
                rows = cache.unread(input_ids, mask.bool())
                input_ids, mask = left_padded(rows)
                # It is among what was handed over.
                cache.now = replace(cache.now, pending=())
            arguments["attention_mask"] = mask
            if idle := (mask.sum(1) == 0).nonzero()[:, 0].tolist():
                raise ValueError(
                    f"expected at least one new token in every row to go on from, rows {idle} have none; "
                    "leave them out with cache.batch_select_indices"
                )
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **arguments)
        model: Any = self
        return model(**inputs, return_dict=True)

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' loop; rows that have ended are not read on with what fills their places."""
        model: Any = self
        # A token too many is not to be streamed, to be shown a sleep for, or to be made by one rank alone.
        alone = kwargs.get("streamer") is None and not kwargs.get("synced_gpus")
        ended = Ended(stopping_criteria, may_be_late=alone and model.watch is None and model.branch is None)
        loop: Any = super()._sample  # type: ignore[misc]
        output = loop(input_ids, logits_processor, ended, *args, ended=ended, **kwargs)
        cache = kwargs.get("past_key_values")
        if ended.surplus:
            output = _without_last(output)
            if cache is not None:
                cache.now = ended.before
        if cache is not None and cache.now is not None and ended.last is not None:
            cache.now = replace(cache.now, pending=tuple(ended.last.unbind(0)))
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: SleepCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        ended: Ended | None = None,
        new_tokens: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What one step reads: the whole prompt first, then one token of every row that goes on."""
        if past_key_values is not None and not is_first_iteration:
            input_ids = input_ids[:, -1:]
            attention_mask = None if ended is None else ended.going_on()
            if ended is not None:
                ended.before = past_key_values.now
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": past_key_values}
        if (ephemeral := kwargs.pop("ephemeral", None)) is not None and (is_first_iteration or past_key_values is None):
            # Without a session every step reads the whole text anew.
            made = 0 if is_first_iteration else max(0, input_ids.shape[1] - ephemeral.shape[1])
            inputs["ephemeral"] = ephemeral if not made else torch.nn.functional.pad(ephemeral, (0, made))
        # transformers counts positions itself, which a session knows, and has made stop strings of the tokenizer.
        dropped = ("labels", "position_ids", "cache_position", "tokenizer")
        return inputs | {name: value for name, value in kwargs.items() if name not in dropped}


def _without_last(output: Any) -> Any:
    """What `generate` gives, ids or all that transformers gives with them, without the last token."""
    if isinstance(output, Tensor):
        return output[:, :-1]
    output.sequences = output.sequences[:, :-1]
    for name in ("scores", "logits"):
        if (steps := getattr(output, name)) is not None:
            setattr(output, name, steps[:-1])
    return output
