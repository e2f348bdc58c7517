"""From tokens to text while they come: no half characters, no stop text, and in the end what decoding gives at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Spoken:
    """The text of one answer.

    Args:
        decode: ids to text.
        stop: texts at which it ends, without them.

    Attributes:
        ids: tokens so far.
        stopped: whether a stop text has come.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._decode, self._stop = decode, tuple(stop)
        self._known = ""
        self._given = 0
        # Tokens before `begin` are decoded for good; those up to `end` are there only to be decoded beside.
        self._begin = self._end = 0

    def add(self, token: int) -> str:
        """One more token; the text that is certain now and was not before."""
        self.ids.append(token)
        before, after = self._decode(self.ids[self._begin : self._end]), self._decode(self.ids[self._begin :])
        if not after.endswith(_BROKEN) and len(after) > len(before):
            self._known += after[len(before) :]
            self._begin, self._end = self._end, len(self.ids)
        return self._give(self._known, is_last=False)

    def finish(self) -> str:
        """The text that was held back."""
        whole = self._decode(self.ids)
        # Decoding piece by piece can differ from decoding at once only where a tokenizer cleans up across pieces.
        return self._give(whole if whole.startswith(self._known[: self._given]) else self._known, is_last=True)

    @property
    def text(self) -> str:
        """All that was given out."""
        return self._known[: self._given]

    def _give(self, text: str, is_last: bool) -> str:
        if self.stopped:
            return ""
        ends = [place for each in self._stop if (place := text.find(each)) >= 0]
        until = min(ends) if ends else len(text) if is_last else len(text) - self._maybe(text)
        self.stopped = bool(ends)
        self._known = text
        fresh = text[self._given : until]
        self._given = max(self._given, until)
        return fresh

    def _maybe(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = 0
        for each in self._stop:
            for length in range(min(len(each) - 1, len(text)), longest, -1):
                if text.endswith(each[:length]):
                    longest = length
                    break
        return longest
