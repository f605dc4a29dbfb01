"""What happened to a program, as one value: JSON for programs; text and pages for people are made of it elsewhere."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True)
class PassReport:
    """One pass of the history.

    Attributes:
        name: its name in recipes
        options: those that differ from their defaults
        promise: what it promises about the outputs
        taken: the sites it rewrote
        missed: the modules it passed over, by reason
        tensors: how many tensors it inserted
        parameters: how many numbers those hold now (0 once they are folded away)
        seconds: how long it took
        proof: how it was held to its promise, or why it was not
        difference: the largest that was found, as a share of the outputs' scale; None when none was looked for
        folding: whether it belongs to folding, after training
    """

    name: str
    options: Mapping[str, Any]
    promise: str
    taken: tuple[str, ...]
    missed: Mapping[str, tuple[str, ...]]
    tensors: int
    parameters: int
    seconds: float
    proof: str = ""
    difference: float | None = None
    folding: bool = False


@dataclass(frozen=True)
class RoleReport:
    """The tensors of one role, each counted once however many names it has.

    Attributes:
        tensors: parameters and buffers
        parameters: how many numbers the parameters hold
        trainable: how many of them train
        size: bytes, of buffers too
    """

    tensors: int
    parameters: int
    trainable: int
    size: int


@dataclass(frozen=True)
class Facts:
    """What happened to a program.

    Attributes:
        model: class, checkpoint, task, stage, dtype, and whether it is folded
        passes: the history, oldest first
        roles: tensors by role
        notes: plain sentences: what the passes buy, what to know
        sections: what methods learned, and what was measured (``parity``, ``training``, ``benchmark``, …), JSON values
    """

    model: Mapping[str, Any]
    passes: tuple[PassReport, ...] = ()
    roles: Mapping[str, RoleReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the parameters hold."""
        return sum(role.parameters for role in self.roles.values())

    @property
    def trainable(self) -> int:
        """How many of them train."""
        return sum(role.trainable for role in self.roles.values())

    def plus(self, **sections: Any) -> Self:
        """The same with further sections: objects, lists of rows, dataclasses, plain values; None adds nothing."""
        added = {name: json_value(value) for name, value in sections.items() if value is not None}
        return dataclasses.replace(self, sections={**self.sections, **added})

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values. Keys keep their meaning from version to version; new ones may join."""
        own = {entry.name: json_value(getattr(self, entry.name)) for entry in dataclasses.fields(self)}
        return {**own, "parameters": self.parameters, "trainable": self.trainable}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The report that :meth:`to_json` gave ``value``; KeyError or TypeError when it gave another."""
        passes = tuple(
            PassReport(
                **{
                    **step,
                    "taken": tuple(step["taken"]),
                    "missed": {reason: tuple(modules) for reason, modules in step["missed"].items()},
                }
            )
            for step in value["passes"]
        )
        roles = {role: RoleReport(**counts) for role, counts in value["roles"].items()}
        return cls(value["model"], passes, roles, tuple(value["notes"]), value["sections"])


def json_value(value: Any) -> Any:
    """``value`` in terms of JSON: dataclasses and mappings as objects, sequences as lists, all else as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no infinity, and a comparison may find one
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, enum.Enum):
        return json_value(value.value)
    if hasattr(value, "to_json"):
        return json_value(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: json_value(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_value(inner) for inner in value]
    return str(value)
