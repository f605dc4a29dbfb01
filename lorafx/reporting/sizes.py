"""What a program weighs and computes, block by block: before and after channels were removed."""

from __future__ import annotations

from typing import Any

import torch

from ..graph.operands import value_of
from ..graph.program import Program
from ..graph.site import block_of, module_path, stack_of

aten = torch.ops.aten

#: Tokens of a text in figures of FLOPs; attention's share depends on it.
TOKENS = 64


def weights_by_block(program: Program) -> dict[str, int]:
    """How many numbers the weights of each block hold (``encoder.layer.3``), the rest under an empty name."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, value in program.root.named_parameters():
        if id(value) not in seen:
            seen.add(id(value))
            block = _block(name)
            sizes[block] = sizes.get(block, 0) + value.numel()
    return sizes


def flops_by_block(program: Program, tokens: int = TOKENS) -> dict[str, int]:
    """Floating-point operations of each block for one token of a text of ``tokens``: two for each use of a weight in a
    linear layer, and four for each channel of attention and token it looks at."""
    sizes: dict[str, int] = {}
    for site in program.sites():
        if site.kind in ("linear", "addmm"):
            block = _block(site.module)
            sizes[block] = sizes.get(block, 0) + 2 * site.out_features * site.in_features
    for node in program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        _, heads, _, width = value_of(node.args[0]).shape
        block = _block(module_path(node, ""))
        sizes[block] = sizes.get(block, 0) + 4 * tokens * int(heads) * int(width)
    return sizes


def block_rows(before: Program, after: Program) -> list[dict[str, Any]]:
    """One row a block: weights and FLOPs before and after, and what is left of them."""
    weights = weights_by_block(before), weights_by_block(after)
    flops = flops_by_block(before), flops_by_block(after)
    rows = []
    for block in dict.fromkeys((*weights[0], *flops[0])):
        held, computed = ([size.get(block, 0) for size in pair] for pair in (weights, flops))
        rows.append(
            {
                "block": block or "outside",
                "parameters before": held[0],
                "parameters after": held[1],
                "left": held[1] / max(1, held[0]),
                "FLOPs before": computed[0],
                "FLOPs after": computed[1],
            }
        )
    return rows


def _block(name: str) -> str:
    number = block_of(name)
    return f"{stack_of(name)}.{number}" if number is not None else ""
