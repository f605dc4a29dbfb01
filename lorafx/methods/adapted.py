"""Passes for adapters that other libraries trained, where these go beyond the ``lora`` pass. Values are loaded later.

The passes know nothing about files: module paths and tensor names say what goes where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from ..base import Method, Promise, option
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import Site, module_path
from .low_rank import ExactLora
from .stacks import StackShape, delta, plus

aten = torch.ops.aten


@dataclass(frozen=True)
class AdapterLora(ExactLora):
    """LoRA of any rank whose update may have a bias, and whose rows may be rescaled to learned lengths (DoRA).

    With magnitudes m: ``y = m / ‖W + s B A‖ ⊙ (W x + s B A x) + b``, lengths over the inputs of an output
    (arXiv 2402.09353, eq. 5); gradients do not flow through them, as in section 4.3.
    """

    promise: ClassVar[Promise] = Promise.SHAPES

    decomposed: bool = option(False, "whether each module has magnitudes")
    shifted: bool = option(False, "whether the update has a bias")

    def leave(self, edit: Edit, site: Site, delta: fx.Node) -> fx.Node:
        shape = (site.out_features, *[1] * (2 * (site.kind == "conv2d")))
        if self.shifted and site.kind != "embedding":
            shift = edit.parameter(site, "lora_B.bias", (site.out_features,))
            moved = edit.call(aten.view.default, edit.call(aten.mul.Tensor, shift, self.scale_of(site)), shape)
            delta = edit.call(aten.add.Tensor, delta, moved)
        if not self.decomposed:
            return delta
        factor = edit.call(aten.view.default, self._factor(edit, site), shape)
        own = edit.cast(site.node, delta.meta["val"].dtype)
        if site.bias is not None:
            bias = edit.cast(site.bias, delta.meta["val"].dtype)
            own = edit.call(aten.sub.Tensor, own, edit.call(aten.view.default, bias, shape))
        grown = edit.call(aten.mul.Tensor, own, edit.call(aten.sub.Tensor, factor, 1.0))
        return edit.call(aten.add.Tensor, grown, edit.call(aten.mul.Tensor, delta, factor))

    def _factor(self, edit: Edit, site: Site) -> fx.Node:
        """The factor of each output: (out,)."""
        names = edit.names(site)
        short_a, short_b = (
            ("lora_embedding_A", "lora_embedding_B") if site.kind == "embedding" else ("lora_A", "lora_B")
        )
        a, b = (edit.tensor(names[short]) for short in (short_a, short_b))
        magnitude = edit.parameter(site, "lora_magnitude_vector", (site.out_features,))
        weight = site.node.args[site.op.weight]
        assert isinstance(weight, fx.Node)
        matrix = edit.cast(weight, magnitude.meta["val"].dtype)
        if site.op.transposed:
            matrix = edit.call(aten.t.default, matrix)
        elif site.kind == "conv2d":
            a, b, matrix = (edit.call(aten.flatten.using_ints, value, 1) for value in (a, b, matrix))
        update = edit.call(aten.mul.Tensor, edit.call(aten.mm.default, b, a), self.scale_of(site))
        whole = edit.call(aten.add.Tensor, matrix, update)
        length = edit.call(aten.linalg_vector_norm.default, whole, 2, [1])
        return edit.call(aten.div.Tensor, magnitude, edit.call(aten.detach.default, length))


@dataclass(frozen=True)
class AdapterWeights(Method):
    """Change weights themselves: update stacks, replace rows of tables, or replace tensors that were trained in full.

    Before: ``f(W)``
    After: ``f(W + s B A)``, ``f(W[rows ← R])`` or ``f(V)``, by operators on tensors alone

    Keeps: shapes; values are loaded afterwards. Does nothing without options.
    """

    promise: ClassVar[Promise] = Promise.SHAPES

    stacks: Mapping[str, StackShape] = option({}, "updates, by the name of the parameter")
    rows: Mapping[str, tuple[int, ...]] = option({}, "the rows that are replaced, by the name of the table")
    whole: tuple[str, ...] = option((), "tensors that have other values, also where they are tied")
    copies: tuple[str, ...] = option((), "tensors that have values of their own, though they were tied")

    def sites(self, program: Program) -> Selection[tuple[str, str]]:
        # A table may be in two options: its rows are replaced after the table is.
        options = ("whole", "copies", "stacks", "rows")
        return Selection(tuple((option, name) for option in options for name in getattr(self, option)))

    def rewrite(self, edit: Edit, site: tuple[str, str]) -> None:
        option, name = site
        if option == "stacks":
            self._update(edit, name, self.stacks[name])
        elif option == "rows":
            self._replace_rows(edit, name, self.rows[name])
        else:
            _take(edit, name, edit.aliases(name) if option == "whole" else [name])

    def _update(self, edit: Edit, name: str, stack: StackShape) -> None:
        site, leaf = site_of(edit.program, name), name.rpartition(".")[2]
        shape_a, shape_b = stack.factors(edit.program.tensor(name).shape)
        a = edit.parameter(site, f"{leaf}_lora_A", shape_a)
        b = edit.parameter(site, f"{leaf}_lora_B", shape_b)
        for node in _reads(edit, name):
            with edit.after(node):
                change = delta(edit, a, b, stack)
                if node.meta["val"].dim() == 2:
                    change = edit.call(aten.squeeze.dim, change, 0)
                edit.replace(node, plus(edit, node, change))

    def _replace_rows(self, edit: Edit, name: str, rows: tuple[int, ...]) -> None:
        site, leaf = site_of(edit.program, name), name.rpartition(".")[2]
        values = edit.parameter(site, f"{leaf}_rows", (len(rows), edit.program.tensor(name).shape[1]))
        index = edit.tensor(edit.constant(f"{name}_row_numbers", torch.tensor(rows)))
        for node in _reads(edit, name):
            with edit.after(node):
                cast = edit.cast(values, node.meta["val"].dtype)
                edit.replace(node, edit.call(aten.index_copy.default, node, 0, index, cast))


def site_of(program: Program, name: str) -> Site:
    """A use of the tensor called ``name``; KeyError when the graph does not use it."""
    tensor = program.tensor(name)
    uses = [site for site in program.sites() if program.tensor(site.parameter) is tensor]
    if not uses:
        raise KeyError(name)
    return uses[0]


def _reads(edit: Edit, name: str) -> list[fx.Node]:
    """The nodes that give the tensor's value, under any of its names."""
    names = edit.aliases(name)
    return [node for node in edit.program.graph.find_nodes(op="get_attr") if node.target in names]


def _take(edit: Edit, name: str, names: list[str]) -> None:
    """Give a tensor storage of its own under ``names``. Where it is tied to others, its own module reads the new tensor
    and every other module the old one."""
    old, own = edit.program.tensor(name), name.rpartition(".")[0]
    kept = [alias for alias in edit.aliases(name) if alias not in names]
    for alias in edit.aliases(name) if kept else ():
        for reader in edit.readers(alias):
            new = name if module_path(reader, alias.rpartition(".")[0]) == own else kept[0]
            reader.replace_input_with(edit.tensor(alias), edit.tensor(new))
    value = nn.Parameter(old.detach().clone(), requires_grad=old.is_floating_point())
    for alias in names:
        edit.set_tensor(alias, value)
