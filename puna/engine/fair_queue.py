"""Who is next: tenants in turn by the work done for them, first come, first served within one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from puna.engine.sequence import Sequence


@dataclass
class _Tenant:
    """``work``: tokens computed for it since it was idle, on the common scale of all that are not."""

    work: float = 0.0
    active: int = 0  # sequences that run or wait
    waiting: deque[Sequence] = field(default_factory=deque)


class FairQueue:
    """Sequences that wait, and an account of work for each tenant that has any (start-time fair queueing).

    The next sequence is the oldest of the tenant that got least. Whoever is not served falls behind in no one's favour,
    so nobody starves; a tenant that comes back starts level with the least served, so that nobody saves up. Those that
    had been admitted before and were put back come before all others, in the order in which they ran.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._returned: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._returned) + sum(len(tenant.waiting) for tenant in self._tenants.values())

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for tenant in self._tenants.values():
            yield from tenant.waiting

    @property
    def num_tenants(self) -> int:
        """How many have sequences that run or wait."""
        return len(self._tenants)

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        name = sequence.request.tenant
        if name not in self._tenants:
            self._tenants[name] = _Tenant(min((tenant.work for tenant in self._tenants.values()), default=0.0))
        self._tenants[name].active += 1
        self._tenants[name].waiting.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran waits again, before all others."""
        self._returned.appendleft(sequence)

    def candidates(self) -> list[Sequence]:
        """Who may be admitted next: the one that was put back, or else the oldest of each tenant."""
        if self._returned:
            return [self._returned[0]]
        return [tenant.waiting[0] for tenant in self._tenants.values() if tenant.waiting]

    def take(self, sequence: Sequence) -> None:
        """One that waits does so no longer."""
        if sequence in self._returned:
            self._returned.remove(sequence)
        else:
            self._tenants[sequence.request.tenant].waiting.remove(sequence)

    def work(self, sequence: Sequence) -> float:
        """How much its tenant got."""
        return self._tenants[sequence.request.tenant].work

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """Tokens are computed for a sequence."""
        self._tenants[sequence.request.tenant].work += num_tokens

    def forget(self, sequence: Sequence) -> None:
        """It has ended. An account is closed with its tenant's last sequence."""
        tenant = self._tenants[sequence.request.tenant]
        tenant.active -= 1
        if not tenant.active:
            del self._tenants[sequence.request.tenant]
