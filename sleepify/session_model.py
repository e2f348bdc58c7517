"""What a session has its model and tokenizer do: make ids, read them, sleep, write answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from sleepify.cache import SleepCache
from sleepify.conversation import front
from sleepify.generation import left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.progress import Progress, bar
from sleepify.rows import NO_COLUMNS
from sleepify.settings import Loops

# Where a session may sleep by itself; each of these ends what those before it end.
Boundary = Literal["document", "turn"]
_BOUNDARIES = (None, "document", "turn")
# Windows that are read between two reports of progress.
_PIECE = 8


def check_parts(model: object, tokenizer: object, sleep_at: Boundary | None, background: bool) -> None:
    """See that a `Session` can be made of these.

    Raises:
        TypeError: for a model that does not sleep, or what is no tokenizer.
        ValueError: for another boundary, or a model that cannot sleep in the background.
    """
    if not isinstance(model, SleepForCausalLM):
        raise TypeError(
            f"expected a model that sleeps, got {type(model).__name__}; sleepify(model) makes one, and an adapter "
            "of peft goes into it by merge_and_unload()"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"expected a tokenizer of transformers, got {type(tokenizer).__name__}")
    if sleep_at not in _BOUNDARIES:
        raise ValueError(f"expected sleep_at to be 'document', 'turn' or None, got {sleep_at!r}")
    if not isinstance(background, bool):
        raise ValueError(f"expected background to be True or False, got {background!r}")
    if background and model.blocks.changes_modules:
        raise ValueError(
            "expected a base that several threads may call, for background=True, got "
            f"{model.config.text_config.model_type}, some of whose layers are changed for the length of a call; leave "
            "background out"
        )


class SessionModel:
    """The part of a `Session` that calls the two; what fails may leave a part done, which the session takes back.

    Attributes:
        model: it sleeps.
        tokenizer: the model's.
        cache: what was read.
        background: whether sleeps that nobody waits for are made in the background.
    """

    model: SleepForCausalLM
    tokenizer: PreTrainedTokenizerBase
    cache: SleepCache
    background: bool

    @torch.no_grad()
    def _read(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        n_loops: Loops | None = None,
        ephemeral: bool = False,
        background: bool = False,
    ) -> None:
        """Read in pieces that end one token after a window, where next to nothing has to be awake between them.

        In the background is the sleep on the last window that is filled, unless that would end what is ephemeral.
        """
        if not ids:
            return
        device, window, have = self.model.device, int(self.model.config.window_size), self._open()
        ends = [*range(window - have + (_PIECE - 1) * window + 1, len(ids), _PIECE * window)]
        last = (have + len(ids)) // window * window - have
        nap = last if background and last > 0 and not (ephemeral or any(self.cache.ephemeral)) else None
        with bar(len(ids) if ends and progress is None else 0) as shown:
            begin = 0
            for end in sorted({*ends, len(ids)} | ({nap} if nap else set())):
                piece = torch.tensor([ids[begin:end]], device=device)
                own = torch.ones_like(piece, dtype=torch.bool) if ephemeral else None
                kept = {"past_key_values": self.cache, "logits_to_keep": NO_COLUMNS}
                self.model(piece, **kept, n_loops=n_loops, ephemeral=own)
                (progress or shown)(end, len(ids))
                begin = end
                if end == nap:
                    self._doze(n_loops, background=True)

    def _open(self) -> int:
        """Tokens of the window that the next one joins, without those that a sleep is being made on."""
        now = self.cache.now
        if now is None:
            return 0
        held = 0 if now.nap is None else now.nap.held[0]
        return now.open_lengths[0] + sum(map(len, now.pending)) - held

    def _awaited(self) -> None:
        """Where sleeps that nobody asked for are made in the background, no answer depends on how long they take."""
        if self.background:
            self.cache.wait()

    @torch.no_grad()
    def _doze(self, n_loops: Loops | None = None, background: bool = False) -> None:
        """Sleep on what is awake."""
        self.model.sleep(self.cache, n_loops=n_loops, background=background)

    def _generate(
        self, prompts: Sequence[Sequence[int]], arguments: dict[str, Any], new_tokens: bool = True
    ) -> list[list[int]]:
        """The ids that the model makes after each prompt; the cache has a row for each of them afterwards."""
        if len(prompts) > 1:
            self.cache.batch_repeat_interleave(len(prompts))
        before = tokens_of(self.cache) if new_tokens else [0]
        ids, mask = left_padded([torch.tensor(prompt, device=self.model.device) for prompt in prompts])
        ours = {"attention_mask": mask, "past_key_values": self.cache, "return_dict_in_generate": False}
        made: Any = self.model.generate(ids, new_tokens=new_tokens, tokenizer=self.tokenizer, **ours, **arguments)
        rows = made[:, ids.shape[1] :].tolist()
        counts = zip(tokens_of(self.cache), before * (len(rows) // len(before)), prompts, strict=True)
        return [row[: now - then - len(prompt)] for row, (now, then, prompt) in zip(rows, counts, strict=True)]

    def _ids(self, text: str, what: str) -> list[int]:
        """The ids of a text, behind BOS if nothing was read before."""
        if not isinstance(text, str):
            raise TypeError(f"expected a {what} as str, got {type(text).__name__}")
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise ValueError(f"expected a {what} of at least one token, got {text!r}")
        return ids if tokens_of(self.cache)[0] else [*front(self.tokenizer), *ids]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def tokens_of(cache: SleepCache) -> list[int]:
    """Tokens of each row's text, pending ones too; one row of none for an empty session."""
    return [seen + len(ids) for seen, ids in zip(cache.seen, cache.pending, strict=True)] or [0]
