"""One session of the server, and its files.

    ID.json               whose it is, the conversation, and where the open window begins
    ID.TURN.safetensors   the sleeping memory, with its digest

The second is written first, and the first one names it: whenever the process dies, a whole session is found.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from sleepify.cache import SleepCache
from sleepify.files import discard, written_beside
from sleepify.memory import Memory
from sleepify.serving.prefixes import NOTHING

Message = dict[str, str]
_KEPT: dict[str, type] = {
    **dict.fromkeys(("id", "key", "owner", "start_digest"), str),
    **dict.fromkeys(("turn", "start", "windows", "bytes"), int),
    **dict.fromkeys(("created", "used"), float),
    **dict.fromkeys(("messages", "open_ids"), list),
    "named": bool,
    "made_by": str,
}
# What is written here, whole or as a draft; other files in the folder are left alone.
OURS = re.compile(r"\.?(sess|resp)_[\w-]{32}(\.\d+)?(\.draft)?\.(json|safetensors)")


@dataclass(eq=False)
class Session:
    """One conversation and the memory that it left.

    Attributes:
        id: which nobody can guess: 192 random bits after "sess_" or "resp_".
        key: hash of the API key that it belongs to.
        owner: the model that it belongs to, as `SleepCache.owner` names it.
        made_by: weights and settings that its memory is of.
        named: whether its user has called it by its id; others may give way to new ones.
        messages: the conversation; the template renders it anew in every turn.
        turn: how many turns it has had.
        start: tokens read before its open window.
        start_digest: of these tokens.
        open_ids: tokens of the open window.
        windows: windows slept on.
        cache: its memory; None while it is only on disk.
        bytes: of the memory, in memory or not.
        busy: held during a turn.
        erased: so that a turn that is under way leaves nothing behind.
        digest: that of the tokens before the open window, to go on with; None since it was found on disk.
    """

    id: str
    key: str
    owner: str
    made_by: str
    named: bool = False
    messages: list[Message] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    turn: int = 0
    start: int = 0
    start_digest: str = NOTHING
    open_ids: list[int] = field(default_factory=list)
    windows: int = 0
    cache: SleepCache | None = None
    bytes: int = 0
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    erased: bool = False
    digest: hashlib._Hash | None = None

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.start + len(self.open_ids)

    @property
    def is_response(self) -> bool:
        """Whether it is the end of a response, which never moves."""
        return self.id.startswith("resp_")

    def file(self, folder: Path) -> Path:
        """Where its memory is after its latest turn."""
        return folder / f"{self.id}.{self.turn}.safetensors"


def start_of(cache: SleepCache) -> int:
    """Tokens read before its open window."""
    return cache.seen[0] - cache.open_lengths[0]


def bytes_of(cache: SleepCache) -> int:
    """What it takes in memory."""
    assert cache.now is not None and cache.open_ids is not None
    tensors = [*cache.memory.tensors(), *Memory(1, cache.at_start).tensors(), cache.open_ids]
    # The state at the window's start may be the state now.
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def record_of(session: Session) -> str:
    """What its first file holds."""
    return json.dumps({name: getattr(session, name) for name in _KEPT})


def read_record(path: Path) -> Session:
    """The session of a first file, without its memory.

    Raises:
        ValueError, KeyError, TypeError, OSError: for what is none.
    """
    # Older records do not say what made them.
    kept = {"made_by": ""} | json.loads(path.read_text(encoding="utf-8"))
    for name, kind in _KEPT.items():
        if not isinstance(kept[name], kind):
            raise TypeError(f"expected {name} to be a {kind.__name__}, got a {type(kept[name]).__name__}")
    if f"{kept['id']}.json" != path.name:
        raise ValueError(f"expected the record of {path.stem}, got that of {kept['id'][:80]}")
    texts = [text for each in kept["messages"] for text in (each.values() if isinstance(each, dict) else [each, None])]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected messages to hold texts, got something else")
    if not all(isinstance(each, int) and each >= 0 for each in kept["open_ids"]):
        raise TypeError("expected open_ids to be whole numbers of at least 0, got something else")
    return Session(**{name: kept[name] for name in _KEPT})


def write(folder: Path, path: Path, record: str, cache: SleepCache | None, before: Path | None) -> None:
    """Its files: the memory, if there is a new one, then the record that names it; the memory before goes last."""
    session_id = path.name.split(".")[0]
    if cache is not None:
        cache.save(path)
    try:
        with written_beside(folder / f"{session_id}.json") as draft:
            # The conversation is for nobody else's eyes, whatever the folder allows.
            draft.touch(mode=0o600)
            draft.write_text(record, encoding="utf-8")
    except BaseException:
        if cache is not None:
            # No record names it.
            discard(path)
        raise
    if before is not None:
        discard(before)


def remove(folder: Path, session_id: str) -> None:
    """All files of a session."""
    # The record goes first: without it the rest is nobody's.
    discard(folder / f"{session_id}.json")
    for path in folder.glob(f"{session_id}.*"):
        discard(path)
