"""What the numbers of weights and the channels of attention cost: one each, operations, or time on a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import UsageError
from ..graph.site import Site

Measure = Literal["parameters", "flops", "latency"]


@dataclass(frozen=True)
class Prices:
    """What things cost, in a unit of one's own.

    Attributes:
        number: a number of a weight, for each text
        channel: a channel of a head, which attention mixes over positions
        shapes: prices of numbers by the shape of their weight, ``384x1536`` (in x out); ``number`` is not read then
        calls: by the same names, and ``attention``, what a call costs however narrow it is; 0 where none is given
    """

    number: float = 1.0
    channel: float = 0.0
    shapes: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, float] = field(default_factory=dict)

    def of(self, site: Site) -> float:
        """What one number of a weight costs; UsageError for a shape that was not measured."""
        if not self.shapes:
            return self.number
        shape = shape_name(site)
        if shape not in self.shapes:
            known = ", ".join(self.shapes)
            raise UsageError(f"{site.module}: no latency of {shape} (known: {known}); measure it with lorafx latency")
        return self.shapes[shape]


#: What attention is called in a table of latencies, and what follows a name where a call is priced.
ATTENTION, CALL = "attention", "-call"


def shape_name(site: Site) -> str:
    """A weight's shape as tables of latencies name it: in x out."""
    return f"{site.in_features}x{site.out_features}"


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
    if ATTENTION not in latency:
        raise UsageError("measure = latency needs a table of latencies; lorafx latency CHECKPOINT measures one")
    calls = {name.removesuffix(CALL): seconds for name, seconds in latency.items() if name.endswith(CALL)}
    shapes = {name: seconds for name, seconds in latency.items() if name != ATTENTION and not name.endswith(CALL)}
    return Prices(channel=latency[ATTENTION], shapes=shapes, calls=calls)
