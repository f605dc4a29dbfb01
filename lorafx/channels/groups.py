"""The axes of a program for people: which dimensions of which tensors go together, and what keeps those that stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..deferred.slices import nonzero
from ..graph.facts import ZeroButKept
from ..graph.program import Program
from .axes import Axes, stuck
from .axis import Array
from .table import RULES


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor in a group.

    Attributes:
        tensor: its name
        dim: the dimension
        size: how long it is
        offset: where along it the group's channels begin (three projections in one weight have three)
    """

    tensor: str
    dim: int
    size: int
    offset: int


@dataclass(frozen=True)
class Group:
    """Dimensions whose channels stay or go together.

    Attributes:
        members: the dimensions, in graph order
        channels: how many different channels they have
        rows: how many rows (heads) the channels lie in; 0 when in none
        removable: how many channels could go if they were zero, alone or with their row
        pinned_by: why the others stay
    """

    members: tuple[Member, ...]
    channels: int
    rows: int
    removable: int
    pinned_by: tuple[str, ...]

    def __str__(self) -> str:
        rows = f" in {self.rows} rows" if self.rows else ""
        where = ", ".join(f"{m.tensor}[{m.dim}]" + (f"+{m.offset}" if m.offset else "") for m in self.members)
        why = f"; pinned: {'; '.join(self.pinned_by)}" if self.pinned_by else ""
        return f"{self.removable} of {self.channels} channels removable{rows}: {where}{why}"


def axis_groups(program: Program) -> list[Group]:
    """Every group of dimensions of a program's tensors, those that can shrink first, in graph order."""
    axes = Axes(program, RULES)
    fixed = stuck(axes)
    groups = [_group(axes, sorted(part), fixed) for part in _parts(axes)]
    return sorted(groups, key=lambda group: group.removable == 0)


def _parts(axes: Axes) -> Iterator[list[tuple[int, str, int]]]:
    """Connected parts of the graph whose nodes are dimensions and whose edges are shared classes."""
    import networkx as nx  # slow to import, and most programs have nothing to group

    graph = nx.Graph()
    first: dict[int, tuple[int, str, int]] = {}
    for place, (name, dims) in enumerate(axes.members.items()):
        for dim, labels in enumerate(dims):
            if labels.size < 2:
                continue
            node = (place, name, dim)
            graph.add_node(node)
            for step in np.unique(axes.tied_class[labels]).tolist():
                graph.add_edge(node, first.setdefault(step, node))
    yield from (list(part) for part in nx.connected_components(graph))


def _group(axes: Axes, part: list[tuple[int, str, int]], fixed: Array) -> Group:
    every = np.concatenate([axes.members[name][dim] for _, name, dim in part])
    channels = np.unique(axes.channel[every])
    rows = np.unique(axes.head_row[every])
    smallest = np.unique(axes.tied_class[every])
    members = []
    for _, name, dim in part:
        labels = axes.members[name][dim]
        offset = int(np.flatnonzero(np.isin(axes.tied_class[labels], smallest))[0])
        members.append(Member(name, dim, labels.size, offset))
    kept = set(axes.tied_class[every[fixed[every]]].tolist())
    why = dict.fromkeys(why for label, why in axes.pins.items() if int(axes.tied_class[label]) in kept)
    removable = int((~fixed[channels]).sum())
    return Group(tuple(members), len(channels), int((rows >= 0).sum()), removable, tuple(why))


def group_rows(groups: list[Group]) -> list[dict[str, Any]]:
    """The groups as JSON values."""
    return [
        {
            "removable": group.removable,
            "channels": group.channels,
            "rows": group.rows,
            "members": [vars(member) for member in group.members],
            "pinned_by": list(group.pinned_by),
        }
        for group in groups
    ]


def zeros_left(axes: Axes) -> list[ZeroButKept]:
    """Rows and columns of weights that are zero and stay, with the reason."""
    why = {int(axes.tied_class[label]): reason for label, reason in axes.pins.items()}
    rows = []
    for name, dims in axes.members.items():
        value = axes.program.tensor(name)
        for dim, labels in enumerate(dims if value.dim() in (2, 3) and value.is_floating_point() else []):
            zero = (~nonzero(value, dim)).nonzero().flatten().tolist()
            if zero and labels.size > 1:
                reason = why.get(int(axes.tied_class[labels[zero[0]]]), "others beside them stay")
                rows.append(ZeroButKept(name, dim, len(zero), labels.size, reason))
    return rows
