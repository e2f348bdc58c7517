"""A conversation as a chat template renders it: which ids it has, and how they will stand once more turns follow."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from sleepify.snapshot import Snapshot

# Beginnings of a turn that have no first character in common, and merge differently with what stands before them.
_PROBES = ("0", "a", " a", "\n\na", "(")


@dataclass(frozen=True)
class Conversation:
    """The turns of a session, and the ids that stand for them in what it has read.

    Attributes:
        messages: the turns, as templates take them.
        ids: what of the rendered conversation was read, pending ids too.
        fixed: how many of them cannot be read anew, because other text or a sleep came after them.
        opens: whether nothing was read before the conversation.
        mark: the session before the latest answer, and how many ids of the conversation it had read.
    """

    messages: tuple[Mapping[str, str], ...] = ()
    ids: tuple[int, ...] = ()
    fixed: int = 0
    opens: bool = False
    mark: tuple[Snapshot, int] | None = None

    def notes(self) -> dict[str, Any]:
        """For a file; of the mark only how many ids, since the session before the answer is kept beside it."""
        return {
            "messages": [dict(message) for message in self.messages],
            "ids": list(self.ids),
            "fixed": self.fixed,
            "opens": self.opens,
            "mark": None if self.mark is None else self.mark[1],
        }

    @classmethod
    def noted(cls, notes: Mapping[str, Any], before: Snapshot | None = None) -> Conversation:
        """What `notes` were made of, with the session before the latest answer."""
        mark = None if notes["mark"] is None or before is None else (before, notes["mark"])
        return cls(tuple(notes["messages"]), tuple(notes["ids"]), notes["fixed"], notes["opens"], mark)


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], opens: bool) -> list[int]:
    """The ids of a conversation up to where the answer begins; without BOS unless it opens the session.

    Raises:
        ValueError: for a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "expected a tokenizer with a chat template, got one without; set tokenizer.chat_template, or use read and "
            "ask, which need none"
        )
    turns = [dict(message) for message in messages]
    text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if not opens and tokenizer.bos_token:
        text = text.removeprefix(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def settled(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """The ids that every continuation of the conversation begins with, as the template writes its turns from then on.

    Templates may write a turn differently once others follow (without its reasoning, for example), so it is rendered
    with several next turns, and what these have in common is taken.
    """
    messages = [[*conversation.messages, {"role": "user", "content": probe}] for probe in _PROBES]
    first, *others = [render(tokenizer, each, conversation.opens) for each in messages]
    return first[: min(in_common(first, other) for other in others)]


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text; what it puts behind one is no part of a session."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begins = range(len(whole) - len(plain) + 1)
    return list(whole[: next((k for k in begins if whole[k : k + len(plain)] == plain), 0)])


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the vocabulary, by which a saved session knows its tokenizer again."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
