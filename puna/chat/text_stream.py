"""Tokens back to text, as they come: characters put together from bytes, and the end at a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

from puna.errors import RequestError


class TextStream:
    """The text of one answer.

    ``token_bytes`` gives the bytes that a token adds. Characters are handed out when whole; bytes that are not UTF-8
    become U+FFFD, exactly as decoding the whole answer at once would have it. Text that may be the beginning of a stop
    string is held back. The stop string that is complete first ends the answer: neither it nor anything after it is
    handed out, and ``stopped`` holds it. Tokens in ``skip`` (control tokens) add nothing. Raises RequestError for an
    empty stop string.
    """

    def __init__(
        self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = (), skip: Collection[int] = ()
    ) -> None:
        if "" in stop:
            raise RequestError("a stop string must not be empty")
        self.stopped: str | None = None
        self._token_bytes = token_bytes
        self._stop = tuple(stop)
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        """Text that became certain with this token; empty once stopped."""
        if self.stopped is not None or token in self._skip:
            return ""
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The rest: what was held back, and U+FFFD for an incomplete character. Empty once stopped."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        held, self._held = self._held + text, ""
        found = self._first_stop(held)
        if found is not None:
            start, self.stopped = found
            return held[:start]
        keep = self._possible_start(held)
        self._held = held[keep:]
        return held[:keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where the stop string begins that ends first; of those that end together, the longest."""
        ends = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not ends:
            return None
        _end, start, stop = min(ends)
        return start, stop

    def _possible_start(self, text: str) -> int:
        """Where the earliest beginning of a stop string stands at the end of the text; its length if there is none."""
        longest = max(map(len, self._stop), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
