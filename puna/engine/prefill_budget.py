"""How much of a long prompt a step computes while others wait for their next token: from the time that steps take."""

from __future__ import annotations

from collections import defaultdict, deque

SHARE = 1.25  # of the time that decoding takes beside it
FIRST_CHUNK = 64  # tokens, before anything was measured
NUM_RECENT = 15  # measurements
LEAST_SHARE = 0.1  # of a mixed step's time that its prompt tokens are assumed to have cost


class PrefillBudget:
    """Tokens of long prompts for one step, so that they take little more time than the decoding beside them.

    A stream's gap between tokens is then about twice what it is without them. Answers do not depend on how prompts are
    cut, so measured times may decide it. Seconds in, tokens out, no clock.
    """

    def __init__(self) -> None:
        # Of a step that only decodes, by its sequences' magnitude.
        self._decode_seconds: defaultdict[int, _Recent] = defaultdict(_Recent)
        self._token_seconds = _Recent()  # of one more prompt token in a step

    def tokens(self, num_decoding: int) -> int:
        """The most tokens of long prompts for a step in which ``num_decoding`` sequences get their next token."""
        decode, token = self._decoding(num_decoding), self._token_seconds.median
        chunk = FIRST_CHUNK if decode is None or token is None else SHARE * decode / token
        return max(1, int(chunk))  # a prompt always gets on

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from the time that a step took."""
        if seconds <= 0:
            return
        if not num_prompt_tokens:
            self._decode_seconds[num_decoding.bit_length()].add(seconds)
            return
        decode = self._decoding(num_decoding) if num_decoding else 0.0
        if decode is not None:
            self._token_seconds.add(max(seconds - decode, LEAST_SHARE * seconds) / num_prompt_tokens)

    def _decoding(self, num_sequences: int) -> float | None:
        """Seconds of a step that only decodes about so many sequences."""
        if not self._decode_seconds:
            return None
        magnitude = num_sequences.bit_length()
        return self._decode_seconds[min(self._decode_seconds, key=lambda known: (abs(known - magnitude), known))].median


class _Recent:
    """The median of the last measurements, which a few that were disturbed do not move."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=NUM_RECENT)

    @property
    def median(self) -> float | None:
        return sorted(self._values)[len(self._values) // 2] if self._values else None

    def add(self, value: float) -> None:
        self._values.append(value)
