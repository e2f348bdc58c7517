"""What a session has its model and tokenizer do: make ids, read them, sleep, write answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sleepify.cache import SleepCache
from sleepify.conversation import front
from sleepify.generation import left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.progress import Progress, bar
from sleepify.rows import NO_COLUMNS
from sleepify.settings import Loops

# Windows that are read between two reports of progress.
_PIECE = 8


class SessionModel:
    """The part of a `Session` that calls the two; what fails may leave a part done, which the session takes back.

    Attributes:
        model: it sleeps.
        tokenizer: the model's.
        cache: what was read.
    """

    model: SleepForCausalLM
    tokenizer: PreTrainedTokenizerBase
    cache: SleepCache

    @torch.no_grad()
    def _read(
        self,
        ids: Sequence[int],
        progress: Progress | None = None,
        n_loops: Loops | None = None,
        ephemeral: bool = False,
    ) -> None:
        """Read in pieces that end one token after a window, where next to nothing has to be awake between them."""
        if not ids:
            return
        device, window = self.model.device, int(self.model.config.window_size)
        ends = [*range(window - sum(self.cache.open_lengths) + (_PIECE - 1) * window + 1, len(ids), _PIECE * window)]
        with bar(len(ids) if ends and progress is None else 0) as shown:
            begin = 0
            for end in (*ends, len(ids)):
                piece = torch.tensor([ids[begin:end]], device=device)
                own = torch.ones_like(piece, dtype=torch.bool) if ephemeral else None
                kept = {"past_key_values": self.cache, "logits_to_keep": NO_COLUMNS}
                self.model(piece, **kept, n_loops=n_loops, ephemeral=own)
                (progress or shown)(end, len(ids))
                begin = end

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
