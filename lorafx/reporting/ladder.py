"""The way from the base to what is deployed, rung by rung, with the largest difference that was found at each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .answer import score_of, subject
from .facts import Facts, PassReport


@dataclass(frozen=True)
class Rung:
    """One step of the way.

    Attributes:
        name: what stands here
        said: what was done, and how it was held against the rung before
        difference: the largest found, as a share of the outputs' scale; None where none was looked for
        instead: what stands for a difference where none is looked for
    """

    name: str
    said: str
    difference: float | None = None
    instead: str = "not compared"

    @property
    def figure(self) -> str:
        """The difference for people."""
        if self.difference is None:
            return self.instead
        return "0, every bit" if self.difference == 0 else f"{self.difference:.1e}"


def rungs(facts: Facts) -> list[Rung]:
    """The ladder of a report, from the base up; as far as its program went."""
    found = [Rung("base", subject(facts), None, "")]
    before = [step for step in facts.passes if not step.folding]
    if before:
        found.append(_of_passes("rewritten", before))
    score = score_of(facts)
    if score is not None:
        found.append(Rung("trained", f"{score.name} {score.value} {score.on}", None, "learned"))
    after = [step for step in facts.passes if step.folding]
    if after:
        found.append(_of_passes("folded", after))
    parity = facts.sections.get("parity")
    if isinstance(parity, Mapping) and "ok" in parity:
        gap, said = parity.get("max_rel"), [parity.get("summary", ""), *parity.get("notes", ())]
        number = gap if isinstance(gap, (int, float)) else None
        found.append(Rung("deployed", "; ".join(map(str, said)), number))
    return found


def _of_passes(name: str, steps: Iterable[PassReport]) -> Rung:
    """The passes of one rung: the largest of their differences, unless one of them was not compared."""
    steps = list(steps)
    names = ", ".join(dict.fromkeys(step.name for step in steps))
    apart = [step for step in steps if step.difference is None]
    if apart:
        why = apart[0].proof or "no difference was written down"
        said = f"{names}; {apart[0].name}: {why}"
        if all(step.proof.startswith("equal") for step in apart):  # by a lorafx that kept the words alone
            return Rung(name, said, None, "equal")
        changed = all(step.promise in ("shapes", "nothing") for step in apart)
        return Rung(name, said, None, "changed" if changed else "not compared")
    gap = max(step.difference or 0.0 for step in steps)
    return Rung(name, f"{names}; each held against the program before it", gap)
