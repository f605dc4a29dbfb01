"""Fold every affine region around a weight into that weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from ..affine.regions import Region
from ..affine.rules import groups_of
from ..affine.values import diagonal_blocks
from ..affine.worth import Group, bias_of, weight_of, worth_folding
from ..base import Pass, Promise
from ..deferred.kept import keep_bits
from ..errors import UsageError
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.site import WEIGHT_OPS, is_tensor_node, module_path
from ..graph.tree import has_tensor


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold every affine region around a weight into that weight.

    Before: ``y = g ⊙ (W x + b) + B (s · A x)`` — any operators that are affine in one tensor
    After: ``y = W' x + b'``

    Factors are composed in fp64 and rounded once, to the weight's dtype. A region folds only if nothing outside reads
    its inner values and if it frees numbers that were learned; so factorised layers stay, and so does the base model.
    A weight that all its readers fold the same way stays shared; else each reader gets its own, and ties are broken.

    Keeps: the outputs, up to rounding. Does nothing where no region shrinks.
    Source: linear algebra; for LoRA it is W' = W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).
    """

    promise: ClassVar[Promise] = Promise.CLOSE
    fixed_point: ClassVar[bool] = True

    def sites(self, program: Program) -> Selection[Group]:
        found = tuple(worth_folding(program))
        if found and program.device.type == "meta":
            raise UsageError(
                f"{self.pass_name()}: {program.name} was captured without weights, and there are some to compose; "
                "capture it with meta=False (lorafx rewrite --verify-each)"
            )
        return Selection(found)

    def rewrite(self, edit: Edit, site: Group) -> None:
        regions = {region.key: region for region in site.regions}
        names = {key: _store(edit, region) for key, region in regions.items()}
        biases = {key: _bias_name(region) for key, region in regions.items()}
        for region in site.regions:
            _rewire(edit, region, *names[region.key])
        edit.sweep(node for region in site.regions for node in region.nodes)
        _settle(edit, site, {key: weight for key, (weight, _) in names.items()})
        for key, (_, bias) in names.items():
            if bias is not None:
                old, own = biases[key]
                _name(edit, bias, own, replace=old)


def _pack(carrier: fx.Node, matrix: Tensor, like: Tensor) -> Tensor:
    blocks = diagonal_blocks(matrix, groups_of(carrier))
    stored = WEIGHT_OPS[carrier.target].stored(blocks, like.shape).to(like.dtype)
    # A weight that did not change keeps its bits: -0.0 + 0 is +0.0.
    return keep_bits(stored.detach(), like.detach()).contiguous()


def _store(edit: Edit, region: Region) -> tuple[str, str | None]:
    """Store the composed weight, and the bias if the map has an offset, under new names."""
    assert region.carrier is not None
    name = str(weight_of(region.carrier).target)
    old, role = edit.program.tensor(name), edit.program.roles.get(name, "base")
    matrix, offset = region.evaluate()
    assert matrix is not None, "a carrier's map is written out"
    weight = _pack(region.carrier, matrix, old)
    bias = None if offset is None else edit.add_tensor(f"{name}_folded_bias", offset.to(old.dtype), role)
    return edit.add_tensor(f"{name}_folded", weight, role), bias


def _bias_name(region: Region) -> tuple[bool, str]:
    """Whether the carrier has a bias of its own, and the name for its new one."""
    assert region.carrier is not None
    bias = bias_of(region.carrier)
    return (
        (True, str(bias.target)) if bias is not None and is_tensor_node(bias) else (False, _of_module(region, "bias"))
    )


def _rewire(edit: Edit, region: Region, weight: str, bias: str | None) -> None:
    """Let the carrier compute the whole map, and the operators on its way be identities."""
    carrier = region.carrier
    assert carrier is not None
    use = WEIGHT_OPS[carrier.target]
    replaced = [weight_of(carrier), bias_of(carrier)]
    carrier.update_arg(use.weight, edit.tensor(weight))
    if bias is not None:
        assert use.bias is not None
        carrier.args = (*carrier.args, *[None] * (use.bias + 1 - len(carrier.args)))
        carrier.update_arg(use.bias, edit.tensor(bias))
    for node, kept in region.identities():
        node.replace_all_uses_with(kept)
    edit.sweep(node for node in replaced if node is not None)


def _settle(edit: Edit, site: Group, weights: dict[Any, str]) -> None:
    """Give the new weights the names a checkpoint has for them, now that it shows who still reads the old weight."""
    old = site.weight
    alike = edit.aliases(old)
    if len(weights) == 1 and not any(edit.readers(name) for name in alike):
        (name,) = weights.values()
        for alias in alike:
            edit.set_tensor(alias, edit.program.tensor(name))
        edit.rename(name, old)
        return
    for region in {region.key: region for region in site.regions}.values():
        wanted = _of_module(region, old.rpartition(".")[2])
        if wanted in alike:
            _move_readers(edit, wanted, [name for name in alike if name != wanted])
        _name(edit, weights[region.key], wanted, replace=wanted in alike)


def _move_readers(edit: Edit, name: str, others: list[str]) -> None:
    """Let those who read a tied tensor under ``name`` read it under the name it has in their own module, if any."""
    for node in edit.readers(name):
        own = f"{module_path(node, '')}.{name.rpartition('.')[2]}"
        if own in others:
            node.replace_input_with(edit.tensor(name), edit.tensor(own))


def _of_module(region: Region, leaf: str) -> str:
    assert region.carrier is not None
    module = module_path(region.carrier, str(weight_of(region.carrier).target).rpartition(".")[0])
    return f"{module}.{leaf}" if module else leaf


def _name(edit: Edit, name: str, wanted: str, *, replace: bool = False) -> None:
    """Rename a tensor, unless someone reads another one of that name."""
    if not edit.readers(wanted) and (replace or not has_tensor(edit.program.root, wanted)):
        edit.rename(name, wanted)
