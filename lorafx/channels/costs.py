"""What removable units cost: the numbers of their weights, operations, or the time they take on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError
from ..graph.site import Site

Measure = Literal["parameters", "flops", "latency"]

#: What a table of latencies calls the time of the whole model, and what follows the name of a kind of unit where the
#: price is that of what goes with the last unit of a weight only.
WHOLE, CALL = "whole", "-call"


@dataclass(frozen=True)
class Prices:
    """What things cost, in some unit: counted for each number, or measured for each unit.

    Attributes:
        number: a number of a weight, for each token
        channel: a channel of a head, which attention mixes over positions
        latency: read instead, if given: seconds of the whole model, of a unit by its kind
            (:func:`kind_of`), and, by that name and ``-call``, of what goes with a weight's last unit
    """

    number: float = 1.0
    channel: float = 0.0
    latency: Mapping[str, float] | None = None

    def of(self, site: Site, kind: str) -> tuple[float, float]:
        """Seconds of each unit of a kind that a weight reads, and of what goes with the last of them only.

        UsageError for a kind that was not measured.
        """
        table = self.latency or {}
        if kind not in table:
            known = ", ".join(name for name in table if name != WHOLE and not name.endswith(CALL))
            raise UsageError(f"{site.module}: no latency of {kind} (known: {known}); measure it with lorafx latency")
        return table[kind], table.get(kind + CALL, 0.0)


def kind_of(site: Site, count: int, alone: bool) -> str:
    """The name in tables of latencies of the units that a weight reads: how many there are, and its shape, in x out.

    ``alone`` marks one computed for a single token only, which takes next to nothing.
    """
    return f"{count} of {site.in_features}x{site.out_features}{' of one token' if alone else ''}"


def prices(measure: Measure, length: int, latency: Mapping[str, float]) -> Prices:
    """The prices that a budget counts in.

    Args:
        measure: numbers of weights, multiply-adds for a token, or seconds
        length: tokens of a text: a channel of attention takes part in two products with each
        latency: what ``lorafx latency`` printed on the machine that will run the model
    """
    if measure == "parameters":
        return Prices()
    if measure == "flops":
        return Prices(channel=2.0 * length)
    if WHOLE not in latency:
        old = f" (this one has no {WHOLE!r}: it prices operators, as version 0.1 did)" if latency else ""
        raise UsageError(f"measure = latency needs a table that lorafx latency CHECKPOINT measured{old}")
    return Prices(latency=latency)
