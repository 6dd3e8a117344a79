"""How much of a prompt a step may compute while others wait for their next token: from the time that steps take."""

from __future__ import annotations

SMALLEST_CHUNK = 16  # tokens; a prompt always gets on
FIRST_CHUNK = 64  # tokens, before anything was measured
WEIGHT = 1 / 8  # of a new measurement in an average
LEAST_SHARE = 0.1  # of a mixed step's time that its prompt tokens are assumed to have cost


class PrefillBudget:
    """Prompt tokens for one step, so that they take no longer than the decoding beside them.

    Then a stream's gap between tokens is about twice what it is without prompts. Where more sequences wait for their
    first token than for their next one, prompts get so many times more: everyone's share of the time is the same.
    Answers do not depend on how prompts are cut, so measured times may decide it. Seconds in, tokens out, no clock.
    """

    def __init__(self) -> None:
        self._decode_seconds: dict[int, float] = {}  # of a step that only decodes, by its sequences' magnitude
        self._token_seconds: float | None = None  # of one more prompt token in a step

    def tokens(self, num_decoding: int, num_prefilling: int) -> int:
        """The most prompt tokens for a step in which ``num_decoding`` sequences get their next token."""
        share = max(1.0, num_prefilling / num_decoding)
        decode = self._decoding(num_decoding)
        chunk: float = FIRST_CHUNK
        if decode is not None and self._token_seconds is not None:
            chunk = decode / self._token_seconds
        return max(SMALLEST_CHUNK, int(chunk * share))

    def observe(self, num_decoding: int, num_prompt_tokens: int, seconds: float) -> None:
        """Learn from the time that a step took."""
        if seconds <= 0:
            return
        if not num_prompt_tokens:
            magnitude = num_decoding.bit_length()
            self._decode_seconds[magnitude] = _average(self._decode_seconds.get(magnitude), seconds)
            return
        decode = self._decoding(num_decoding) if num_decoding else 0.0
        if decode is not None:
            prefill = max(seconds - decode, LEAST_SHARE * seconds)
            self._token_seconds = _average(self._token_seconds, prefill / num_prompt_tokens)

    def _decoding(self, num_sequences: int) -> float | None:
        """Seconds of a step that only decodes about so many sequences."""
        if not self._decode_seconds:
            return None
        magnitude = num_sequences.bit_length()
        return self._decode_seconds[min(self._decode_seconds, key=lambda known: (abs(known - magnitude), known))]


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + (new - old) * WEIGHT
