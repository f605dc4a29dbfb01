"""Statistics of training forwards: sums over unpadded tokens, kept in buffers that are saved, resumed and
all-reduced."""

from __future__ import annotations

import torch
from torch import fx

from ..graph.edit import Edit
from ..graph.site import Site
from ..models.tokenizers import is_mask

aten = torch.ops.aten


def measure_input(edit: Edit, site: Site) -> None:
    """Keep two statistics of what enters ``site``: ``square_sum`` (in,) and ``token_count`` (1,), both fp32.

    Summed over the tokens that the attention mask lets through, of every training forward since they were last set to
    zero; call it inside ``edit.after(site.node)``.
    """
    square_sum = edit.statistic("square_sum", torch.zeros(site.in_features), site)
    token_count = edit.statistic("token_count", torch.zeros(1), site)
    # Whatever its dtype was at capture: under autocast it is bf16, too coarse for sums of squares.
    value = edit.call(aten.to.dtype, edit.call(aten.detach.default, site.input), torch.float32)
    mask = token_mask(edit, value)
    ones = edit.call(aten.ones_like.default, edit.call(aten.select.int, value, -1, 0))
    if mask is not None:
        value = edit.call(aten.mul.Tensor, value, edit.call(aten.unsqueeze.default, mask, -1))
        ones = edit.call(aten.mul.Tensor, ones, mask)
    over = list(range(site.input.meta["val"].dim() - 1))
    squares = edit.call(aten.sum.dim_IntList, edit.call(aten.mul.Tensor, value, value), over)
    edit.accumulate(square_sum, squares)
    edit.accumulate(token_count, edit.call(aten.reshape.default, edit.call(aten.sum.default, ones), [1]))


def token_mask(edit: Edit, value: fx.Node) -> fx.Node | None:
    """The attention mask as fp32 in the shape of ``value`` (…, features) without its last dimension.

    None when no mask of the graph's inputs has that many tokens: a pooled value, an image.
    """
    mask = mask_of(edit.program.graph, value)
    if mask is None:
        return None
    if value.meta["val"].dim() - 1 < mask.meta["val"].dim():
        mask = edit.call(aten.reshape.default, mask, [-1])
    return edit.cast(mask, torch.float32)


def mask_of(graph: fx.Graph, value: fx.Node) -> fx.Node | None:
    """The mask among the inputs for the tokens of ``value`` (…, features): one of its leading sizes, or of as many
    tokens in all, where a value is flattened to (tokens, features). None when there is none. Sizes are compared
    symbolically, so that an encoder's mask is not taken for a decoder's.
    """
    leading = _sizes(value)[:-1]
    for node in graph.find_nodes(op="placeholder"):
        if not is_mask(node.name) or "val" not in node.meta:
            continue
        flat = len(leading) == 1 and str(node.meta["val"].numel()) == leading[0]
        if flat or _sizes(node) == leading:
            return node
    return None


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
