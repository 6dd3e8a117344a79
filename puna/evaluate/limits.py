"""How far a derived model may be from its source before something must have gone wrong."""

from __future__ import annotations

from puna.evaluate.report import Report

# Bits per weight, and the mean KL in nats that models of at least as many still have when all is well. Small models
# suffer most: these are a few times what SmolLM2-135M and stories260K lose to plain rounding.
LIMITS = ((15.0, 0.05), (8.0, 0.3), (4.0, 1.5), (0.0, 4.0))


def largest_divergence(bits_per_weight: float) -> float:
    """The mean KL up to which a model of so many bits per weight is accepted."""
    return next(limit for bits, limit in LIMITS if bits_per_weight >= bits)


def drift(report: Report, max_divergence: float | None = None) -> list[str]:
    """Why the derived model is not to be trusted as a copy of its source, in sentences; none when it is.

    ``max_divergence`` replaces the limit for its bits per weight.
    """
    found = []
    if report.token_ids:
        found.append(f"it reads texts as other tokens ({report.token_ids[0]})")
    if report.template:
        found.append(f"it makes other prompts of conversations ({report.template[0]})")
    limit = largest_divergence(report.derived.bits_per_weight) if max_divergence is None else max_divergence
    if report.kl.mean > limit:
        found.append(f"its predictions diverge by {report.kl.mean:.4f} nats, more than {limit:g}")
    return found
