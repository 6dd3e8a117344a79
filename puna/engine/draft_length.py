"""How many tokens to draft: from how often drafts were right and what a drafted token costs."""

from __future__ import annotations

FORGETTING = 0.85  # what a draft's weight becomes with each draft after it
LONGEST_PAUSE = 64  # tokens
MARGIN = 1.05  # the least gain worth drafting for
FADING = 0.98  # what a step's weight becomes with each step after it
UNKNOWN_COST = 0.1  # before anything was measured


class DraftLength:
    """One sequence's share of accepted tokens, and the draft length that follows from it. Counters only, no clock."""

    def __init__(self) -> None:
        self._accepted = 1.0
        self._tested = 2.0
        self._pause = 0
        self._waited = 0

    def choose(self, price: float, limit: int) -> int:
        """The length of the next draft, at most ``limit``; 0 to draft nothing. Called once for each step.

        With an acceptance of ``a``, a draft of k tokens gives 1 + a + ... + a^k tokens for the price of
        1 + k·``price`` (Leviathan et al. 2023, theorem 3.8). The best k is taken. Where none gains anything, a single
        token is tried now and then, less and less often while it fails.
        """
        share = self._accepted / self._tested
        tokens = expected = best = 1.0
        length = 0
        for k in range(1, limit + 1):
            expected *= share
            tokens += expected
            speed = tokens / (1 + k * price)
            if speed <= best:
                break
            best, length = speed, k
        if best >= MARGIN:
            return length
        self._waited += 1
        return min(limit, 1) if self._waited > self._pause else 0

    def record(self, drafted: int, accepted: int) -> None:
        """Learn from a draft. Tokens after the first that was wrong were not tested."""
        self._accepted = FORGETTING * self._accepted + accepted
        self._tested = FORGETTING * self._tested + min(accepted + 1, drafted)
        self._waited = 0
        self._pause = self._pause // 2 if accepted else min(LONGEST_PAUSE, 2 * self._pause + 2)


class DraftCost:
    """What a drafted token costs, as a share of what an accepted one saves: one sequence's part of a step.

    A fixed number for a step of one sequence, or learnt from the steps: a line is fitted through their seconds against
    their rows (least squares, of which the last fifty steps or so count), and the seconds of drafting are averaged.
    """

    def __init__(self, fixed: float | None) -> None:
        self._learns = fixed is None
        self._row = UNKNOWN_COST if fixed is None else fixed  # seconds of each further row, that of one row being 1
        self._step = 1.0  # seconds of one row
        self._drafting = 0.0  # seconds of drafting one token
        self._count = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def price(self, num_sequences: int) -> float:
        """In a step of that many sequences."""
        step = self._step * (1 + self._row * (num_sequences - 1))
        return num_sequences * (self._row * self._step + self._drafting) / step

    def observe_step(self, rows: int, seconds: float) -> None:
        """Learn from a step that only decodes."""
        if not self._learns:
            return
        self._count = FADING * self._count + 1
        self._rows = FADING * self._rows + rows
        self._seconds = FADING * self._seconds + seconds
        self._rows_rows = FADING * self._rows_rows + rows * rows
        self._rows_seconds = FADING * self._rows_seconds + rows * seconds
        rows_mean, seconds_mean = self._rows / self._count, self._seconds / self._count
        variance = self._rows_rows / self._count - rows_mean * rows_mean
        if variance > 0.1:  # otherwise nearly all had the same number of rows, and say nothing about others
            slope = (self._rows_seconds / self._count - rows_mean * seconds_mean) / variance
            one_row = seconds_mean - slope * (rows_mean - 1)
            self._row = min(1.0, max(0.01, slope / one_row)) if one_row > 0 else 1.0
        self._step = seconds_mean / (1 + self._row * (rows_mean - 1))

    def observe_draft(self, tokens: int, seconds: float) -> None:
        """Learn from the drafting of so many tokens."""
        if self._learns:
            self._drafting += (seconds / tokens - self._drafting) / 8
