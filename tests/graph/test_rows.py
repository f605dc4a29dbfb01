"""Rows that alone are computed: the same function, and only where nobody reads the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

import lorafx
from lorafx.graph.rows import computed_by_row, read_rows
from tests import zoo

WIDTH, HEADS = 12, 2
aten = torch.ops.aten


class Block(nn.Module):
    """A block of an encoder with what is done to its result, and hooks for what may keep rows together."""

    def __init__(self, read: Callable[[Tensor], Any], between: Callable[[Tensor], Tensor] = gelu, **attention: Any):
        super().__init__()
        names = ("query", "key", "value", "output", "up", "down")
        self.layers = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.read, self.between, self.attention = read, between, attention

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.layers[name](x).view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        query, key, value = (self.heads(name, x) for name in ("query", "key", "value"))
        extra: dict[str, Any] = {} if self.attention else {"attn_mask": mask}
        mixed = scaled_dot_product_attention(query, key, value, **self.attention, **extra)
        mixed = mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        x = layer_norm(x + self.layers["output"](mixed), [WIDTH])
        return self.read(x + self.layers["down"](self.between(self.layers["up"](x))))


def inputs(batch: int, length: int, queries: bool = True) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(batch + length)
    mask = torch.rand(batch, 1, length if queries else 1, length, generator=chance) < 0.7
    mask[..., 0] = True
    return torch.randn(batch, length, WIDTH, generator=chance), mask


class Lengths(fx.Interpreter):
    """Runs a graph; over how many tokens each linear layer went."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is aten.linear.default:
            self.found.append(result.shape[1])
        return result

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.found: list[int] = []
        return super().run(*args, **kwargs)


def narrowed(model: nn.Module, queries: bool = True, **options: Any) -> tuple[int, list[Any]]:
    """How many nodes compute less, and the lengths that linear layers then go over: 1, or all.

    The function is held to be the same at two lengths and batches.
    """
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=4)
    sizes = {0: batch, 1: length}, {0: batch, 3: length, **({2: length} if queries else {})}
    before = torch.export.export(model.eval(), inputs(3, 5, queries), dynamic_shapes=sizes).module(check_guards=False)
    after: Any = copy.deepcopy(before)
    count = read_rows(after.graph, **options)
    after.recompile()
    lengths = Lengths(after)
    for shape in ((2, 9), (3, 5)):
        given = inputs(*shape, queries)
        # fp32's own tolerance: products of one row sum in another order.
        torch.testing.assert_close(lengths.run(*given), before(*given))
    return count, [1 if found == 1 else "all" for found in lengths.found]


first, last = (lambda x: x[:, 0]), (lambda x: x[:, -1])


@pytest.mark.parametrize(
    "read", [first, last, lambda x: x[:, :1], lambda x: x[:, 0] * x[:, 0], lambda x: x.select(-2, 0)]
)
@pytest.mark.parametrize("queries", [True, False])
def test_one_token_goes_through_the_block(read: Callable[[Tensor], Tensor], queries: bool) -> None:
    _, lengths = narrowed(Block(read), queries)
    assert lengths == [1, "all", "all", 1, 1, 1]  # query; key, value; output, up, down


def test_it_stops_after_the_attention_if_told_to() -> None:
    _, lengths = narrowed(Block(first), through_attention=False)
    assert lengths == ["all", "all", "all", 1, 1, 1]


def test_a_causal_attention_stays_whole() -> None:
    """Its mask goes by the place of a query, and one query alone is the first."""
    _, lengths = narrowed(Block(last, is_causal=True))
    assert lengths == ["all", "all", "all", 1, 1, 1]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x,
        lambda x: x.mean(1),
        lambda x: (x[:, 0], x),
        lambda x: x[:, 0] + x[:, -1],
        lambda x: x[:, :2],
        lambda x: x[:, 1:2],  # of a text of one token there is none
        lambda x: x.flip(1)[:, 0],
        lambda x: x.cumsum(1)[:, -1],
        lambda x: x[:, :, 0],  # a feature is no row of a product
    ],
)
def test_what_is_read_otherwise_stays(read: Callable[[Tensor], Any]) -> None:
    assert narrowed(Block(read)) == (0, ["all"] * 6)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.softmax(1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.roll(1, 1),
        lambda x: x.index_select(1, torch.arange(x.shape[1]).flip(0)),
        lambda x: x.view(x.shape[0], -1).softmax(-1).view(x.shape),
        lambda x: x * x.sum((1,), True),
    ],
)
def test_what_reads_other_tokens_reads_all_of_them(between: Callable[[Tensor], Tensor]) -> None:
    _, lengths = narrowed(Block(first, between))
    assert lengths == ["all"] * 5 + [1]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.view(x.shape[0], x.shape[1], 3, -1).relu().flatten(2),
        lambda x: x.unflatten(2, (3, 4)).transpose(1, 2).mul(2).transpose(1, 2).reshape(x.shape),
        lambda x: x.softmax(-1),
        lambda x: x.index_select(2, torch.arange(WIDTH).flip(0)),
        lambda x: x * x.sum(-1, keepdim=True),
        lambda x: x @ torch.ones(WIDTH, WIDTH),
        lambda x: torch.where(x > 0, x, 0.1 * x),
    ],
)
def test_what_computes_each_token_alone_is_passed(between: Callable[[Tensor], Tensor]) -> None:
    _, lengths = narrowed(Block(first, between))
    assert lengths[3:] == [1, 1, 1]


def test_arguments_by_name_keep_a_node_whole() -> None:
    """A hand-made graph may call operators otherwise than a tracer does."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    product = graph.call_function(aten.linear.default, (x, graph.placeholder("weight")))
    mixed = graph.call_function(aten.softmax.int, (product,), {"dim": 1})
    read = graph.call_function(aten.select.int, (mixed, 1, 0))
    graph.output(read)
    sizes = {"x": (2, 5, WIDTH), "weight": (WIDTH, WIDTH)}
    for node in graph.nodes:
        node.meta["val"] = torch.empty(sizes.get(node.name, (2, 5, WIDTH)), device="meta")
    assert read_rows(graph) == 0
    assert computed_by_row(graph) == set()


class Shared(Block):
    """Query and key are one value."""

    def heads(self, name: str, x: Tensor) -> Tensor:
        return super().heads("query" if name == "key" else name, x)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        both, value = self.heads("query", x), self.heads("value", x)
        mixed = scaled_dot_product_attention(both, both, value, attn_mask=mask).transpose(1, 2)
        return self.read(self.layers["output"](mixed.reshape(x.shape)))


def test_a_query_that_is_the_key_stays_whole() -> None:
    _, lengths = narrowed(Shared(first))
    assert lengths == ["all", "all", 1]


@pytest.mark.parametrize(("provider", "alone"), [("cpu", 4), ("cuda", 3)])
def test_an_exported_classifier(provider: Any, alone: int, tmp_path: Path) -> None:
    """Of its last block the products after keys and values; with CUDA, those after the attention."""
    result = lorafx.export(zoo.captured("bert"), tmp_path / "onnx", provider=provider)
    assert result is not None
    assert result.ok
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    sizes = {value.name: [size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.value_info}
    products = [sizes.get(node.output[0], []) for node in graph.node if node.op_type == "MatMul"]
    assert sum(size[1:2] == [1] for size in products) == alone


def test_which_weights_go_over_one_token_is_known_of_a_graph_in_training() -> None:
    program = zoo.captured("bert")
    alone = {site.module for site in program.sites() if site.node in computed_by_row(program.graph)}
    last = "bert.encoder.layer.1."
    names = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    assert {name for name in alone if name.startswith("bert.encoder.")} >= {last + name for name in names[1:]}
    assert not any(name.startswith("bert.encoder.layer.0.") or name.endswith((".key", ".value")) for name in alone)
