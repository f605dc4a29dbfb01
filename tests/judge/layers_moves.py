"""Layers that cut, order, repeat, look up and reduce."""

from __future__ import annotations

import random

from tests.judge.build import Builder, Unfit, Value
from tests.judge.layers import activation, layer, linear, tokens, width


def fixed_dim(x: Value, r: random.Random, least: int = 2) -> int:
    """A random dimension of fixed size, the last one more often."""
    found = [dim for dim in range(1, x.rank) if not x.free(dim) and x.number(dim) >= least]
    if not found:
        raise Unfit
    return found[-1] if r.random() < 0.5 else r.choice(found)


def indexed(dim: int, text: str) -> str:
    return "[" + ":, " * dim + text + "]"


@layer(2)
def cat(g: Builder, x: Value, r: random.Random) -> Value:
    kind = r.randrange(6)
    if kind == 0:
        other = g.earlier(r, lambda v: v.shape[:-1] == x.shape[:-1] and not v.free(-1))
        return g.do(f"torch.cat([{x}, {other}], -1)")
    if kind == 1:
        a, b = linear(g, x, width(r), r), linear(g, x, width(r), r)
        return linear(g, g.do(f"torch.cat([{activation(g, a, r)}, {b}], -1)"), width(r), r)
    if kind == 2:
        dim = fixed_dim(x, r)
        return g.do(f"torch.cat([{activation(g, x, r)}, {x}], {dim})")
    if kind == 3:
        x = tokens(x)
        return g.do(f"torch.cat([{x}, {linear(g, x, x.number(2), r)}], 1)")
    if kind == 4:
        size = x.number(-1)
        row = g.part(f"nn.Parameter(torch.randn({r.choice((1, 2))}, {size}))")
        x = tokens(x)
        parts = [f"{row}.expand({x.size(0)}, -1, -1)", str(x)]
        r.shuffle(parts)
        h = g.do(f"torch.cat([{', '.join(parts)}], 1)")
        return g.do(f"{linear(g, h, width(r), r)}[:, 1:]") if r.random() < 0.5 else h
    other = g.earlier(r, lambda v: v.rank == x.rank and v.shape[0] == x.shape[0] and v.shape[2:] == x.shape[2:])
    return g.do(f"torch.cat([{x}, {other}], 1)")


@layer(3)
def part(g: Builder, x: Value, r: random.Random) -> Value:
    """Cut, and often put together in another order."""
    dim = fixed_dim(x, r)
    size = x.number(dim)
    kind = r.randrange(11)
    if kind == 0:
        return g.do(f"{x}{indexed(dim, r.choice(('::2', '1::2', f'::{min(3, size)}')))}")
    if kind == 1:
        return g.do(f"torch.cat([{x}{indexed(dim, '::2')}, {x}{indexed(dim, '1::2')}], {dim})")
    if kind == 2:
        start = r.randrange(size)
        return g.do(f"{x}{indexed(dim, f'{start}:')}")
    if kind == 3:
        start = r.randrange(size - 1)
        return g.do(f"{x}.narrow({dim}, {start}, {r.randint(1, size - start)})")
    if kind == 4:
        pieces = g.several(f"{x}.chunk({r.choice((2, 3))}, {dim})")
    elif kind == 5:
        at = r.randrange(1, size)
        pieces = g.several(f"{x}.split([{at}, {size - at}], {dim})")
    elif kind == 6:
        pieces = g.several(f"torch.tensor_split({x}, {r.choice((2, 3))}, dim={dim})")
    elif kind == 7:
        pieces = [g.do(f"{x}{indexed(dim, f':{size // 2}')}"), g.do(f"{x}{indexed(dim, f'{size // 2}:')}")]
    elif kind == 8:
        pieces = g.several(f"{x}.unbind({dim})")
        r.shuffle(pieces)
        kept = pieces[: r.randint(2, max(2, len(pieces)))]
        kept[0] = activation(g, kept[0], r)
        return g.do(f"torch.stack([{', '.join(map(str, kept))}], {r.choice((dim, dim, 1))})")
    elif kind == 9:
        return g.do(f"{x}.select({dim}, {r.choice((0, -1, size // 2))})") if x.rank > 2 else g.do(f"{x}[:, :-1]")
    else:
        return g.do(f"{x}.unfold({dim}, 2, {r.choice((1, 2))}).{r.choice(('sum(-1)', 'flatten(-2)', 'amax(-1)'))}")
    pieces[0] = activation(g, pieces[0], r)
    if r.random() < 0.3 and len({piece.shape for piece in pieces}) == 1:
        return g.do(r.choice((" + ", " * ")).join(map(str, pieces)))
    r.shuffle(pieces)
    return g.do(f"torch.cat([{', '.join(map(str, pieces))}], {dim})")


@layer(2)
def order(g: Builder, x: Value, r: random.Random) -> Value:
    dim = fixed_dim(x, r)
    size = x.number(dim)
    kind = r.randrange(9)
    if kind == 0:
        return g.do(f"{x}.flip({dim})")
    if kind == 1:
        return g.do(f"{x}.roll({r.randint(1, 3)}, {dim})")
    if kind == 2:
        index = r.sample(range(size), r.randint(1, size))
        return g.do(f"{x}.index_select({dim}, {g.part(f'torch.tensor({index})')})")
    if kind == 3:
        index = [r.randrange(size) for _ in range(r.randint(2, size + 2))]
        return g.do(f"{x}{indexed(dim, str(index))}")
    if kind == 4 and x.rank > 2:
        a, b = r.sample(range(1, x.rank), 2)
        return g.do(f"{x}.transpose({a}, {b})")
    if kind == 5 and x.rank == 4:
        p = r.sample((1, 2, 3), 3)
        return g.do(f"{x}.permute(0, {p[0]}, {p[1]}, {p[2]}).contiguous()")
    if kind == 6:
        halves = [n for n in (2, 3) if size % n == 0]
        if not halves or dim != x.rank - 1:
            raise Unfit
        n = r.choice(halves)
        return g.do(f"{x}.unflatten(-1, ({n}, {size // n})).transpose(-1, -2).flatten(-2)")
    if kind == 7:
        return g.do(f"{x} + {x}.flip({dim})")
    return g.do(f"torch.cat([{x}{indexed(dim, '1:')}, {x}{indexed(dim, ':1')}], {dim})")


@layer(2)
def shape(g: Builder, x: Value, r: random.Random) -> Value:
    """Reshapes that mix dimensions, or go to heads and stay there."""
    size = x.number(-1)
    kind = r.randrange(8)
    if kind == 0 and x.rank >= 3:
        return g.do(f"{x}.flatten(1)")
    if kind == 1 and x.rank == 2 and size % 2 == 0:
        return g.do(f"{x}.view({x.size(0)}, 2, {size // 2})")
    if kind == 2 and x.rank == 3 and size % 2 == 0:
        return g.do(f"{x}.view({x.size(0)}, {x.size(1)}, 2, {size // 2}).transpose(1, 2)")
    if kind == 3 and x.rank == 4:
        return g.do(f"{x}.transpose(1, 2).flatten(2)")
    if kind == 4 and x.rank == 3:
        middle = x.number(1)
        return g.do(f"{x}.reshape({x.size(0)}, {size}, {middle})")
    if kind == 5 and x.rank == 3:
        return g.do(f"{linear(g, x, 8, r)}.reshape({x.size(0)}, -1, 4)")
    if kind == 6 and x.rank == 4:
        return g.do(f"{x}.flatten(2)")
    if x.rank == 2:
        return g.do(f"{x}.unsqueeze(1)")
    return g.do(f"{x}.view({x.size(0)}, -1).view({x.size(0)}, {', '.join(x.size(d) for d in range(1, x.rank))})")


@layer(1.5)
def repetition(g: Builder, x: Value, r: random.Random) -> Value:
    dim = fixed_dim(x, r, least=1)
    size = x.number(dim)
    kind = r.randrange(7)
    if size > 16:
        raise Unfit
    if kind == 0:
        return g.do(f"{x}.repeat_interleave(2, dim={dim})")
    if kind == 1:
        return g.do(f"{x}.repeat({', '.join('2' if d == dim else '1' for d in range(x.rank))})")
    if kind in (2, 3):
        new = dim + (kind == 2)
        sizes = ["2" if d == new else "-1" for d in range(x.rank + 1)]
        return g.do(f"{x}.unsqueeze({new}).expand({', '.join(sizes)}).flatten({dim}, {dim + 1})")
    if kind == 4:
        one = g.do(f"{x}{indexed(dim, ':1')}")
        return g.do(f"{one}.expand({', '.join(str(size) if d == dim else '-1' for d in range(x.rank))}) + {x}")
    if kind == 5:
        counts = [r.randint(0, 2) for _ in range(size - 1)] + [1]
        return g.do(f"{x}.repeat_interleave({g.part(f'torch.tensor({counts})')}, {dim}, output_size={sum(counts)})")
    return g.do(f"torch.tile({x}, ({', '.join('2' if d == dim else '1' for d in range(x.rank))},))")


@layer(2)
def lookup(g: Builder, x: Value, r: random.Random) -> Value:
    """gather, where, cumulative sums, padding, interpolation, masks."""
    dim = fixed_dim(x, r)
    size = x.number(dim)
    kind = r.randrange(14)
    if kind == 0:
        index = [r.randrange(size) for _ in range(r.randint(1, size))]
        name = g.part(f"torch.tensor({index})")
        view = f"{name}.view({', '.join('-1' if d == dim else '1' for d in range(x.rank))})"
        sizes = ", ".join(str(len(index)) if d == dim else x.size(d) for d in range(x.rank))
        return g.do(f"torch.gather({x}, {dim}, {view}.expand({sizes}))")
    if kind == 1:
        return g.do(f"torch.where({x} > 0.37, {x}, {r.choice(('0.0', '-1.0', f'{x} * 0.1'))})")
    if kind == 2:
        mask = g.part(f"torch.rand({x.number(-1)}) > 0.5")
        return g.do(f"torch.where({mask}, {x}, {r.choice(('0.0', f'{x}.flip(-1)', f'-{x}'))})")
    if kind == 3:
        return g.do(f"{x}.masked_fill({g.part(f'torch.rand({x.number(-1)}) > 0.5')}, {r.choice((0.0, 0.5))})")
    if kind == 4:
        return g.do(f"{x}.cumsum({dim})")
    if kind == 5:
        before, after = r.randint(0, 2), r.randint(0, 2)
        amounts = [0, 0] * (x.rank - 1 - dim) + [before, after]
        value = r.choice((0.0, 1.0))
        return g.do(f"F.pad({x}, {amounts}, value={value})")
    if kind == 6 and x.rank == 3 and size > 2:
        return g.do(f"F.pad({x}, (1, 1), mode={r.choice(('reflect', 'replicate', 'circular'))!r})")
    if kind == 7 and x.rank in (3, 4):
        mode = r.choice(("nearest", "linear" if x.rank == 3 else "bilinear"))
        return g.do(f"F.interpolate({x}, scale_factor=2, mode={mode!r})")
    if kind == 8 and x.rank == 3:
        x.number(2)  # of a fixed size: unfit otherwise
        return g.do(f"F.interpolate({x}.transpose(1, 2), size=4, mode='nearest').transpose(1, 2)")
    if kind == 9:
        n = x.number(-1)
        return (
            g.do(f"torch.triu({x})")
            if x.rank == 3 and r.random() < 0.5
            else g.do(f"{x} * torch.arange({n}, dtype={x}.dtype)")
        )
    if kind == 10:
        return g.do(f"{x}.diff(dim={dim})")
    if kind == 11:
        index = [r.randrange(3) for _ in range(size)]
        base = g.do(f"torch.zeros({', '.join('3' if d == dim else x.size(d) for d in range(x.rank))}, dtype={x}.dtype)")
        return g.do(f"{base}.index_add({dim}, {g.part(f'torch.tensor({index})')}, {x})")
    if kind == 12:
        return g.do(f"torch.logsumexp({x}, {dim}, keepdim=True) + {x}")
    return g.do(f"{x} * {g.part(f'(torch.rand({x.number(-1)}) > 0.4).double()')}")


@layer(1.5)
def reduction(g: Builder, x: Value, r: random.Random) -> Value:
    if x.rank < 3:
        raise Unfit
    dim = r.choice(range(1, x.rank))
    call = r.choice(
        ("mean({})", "sum({})", "amax({})", "amin({})", "max({}).values", "std({}, unbiased=False)", "norm(dim={})")
    )
    keep = r.random() < 0.2
    h = g.do(f"{x}.{call.replace('{}', str(dim))}" if not keep else f"{x} - {x}.mean({dim}, keepdim=True)")
    return linear(g, h, width(r), r) if r.random() < 0.6 else h


@layer(2)
def add(g: Builder, x: Value, r: random.Random) -> Value:
    """Meet an earlier value: a residual, or a product."""
    same = g.earlier(r, lambda v: v.shape == x.shape)
    return g.do(
        r.choice((f"{x} + {same}", f"{x} + {same}", f"{x} * {same}", f"{same} - {x}", f"torch.lerp({x}, {same}, 0.3)"))
    )


@layer(1)
def between_tokens(g: Builder, x: Value, r: random.Random) -> Value:
    """Maps over tokens of fixed number, or products of a value with itself."""
    x = tokens(x)
    kind = r.randrange(5)
    if kind == 0:
        n = x.number(1)
        return g.do(f"{g.part(f'nn.Linear({n}, {r.choice((n, 4))})')}({x}.transpose(1, 2)).transpose(1, 2)")
    if kind == 1:
        n = x.number(1)
        h = g.do(f"{x}.transpose(1, 2)")
        return g.do(f"{linear(g, activation(g, linear(g, h, 6, r), r), n, r)}.transpose(1, 2) + {x}")
    if kind == 2:
        a, b = linear(g, x, 6, r), linear(g, x, 6, r)
        return g.do(f"torch.bmm(torch.bmm({a}, {b}.transpose(1, 2)).softmax(-1), {linear(g, x, width(r), r)})")
    if kind == 3:
        a, b = linear(g, x, 4, r), linear(g, x, 5, r)
        return g.do(f"torch.einsum('btc,btd->bcd', {a}, {b})")
    return g.do(f"torch.einsum('btc,bsc->bts', {linear(g, x, 4, r)}, {linear(g, x, 4, r)}) @ {x}")


@layer(0.7)
def state_space(g: Builder, x: Value, r: random.Random) -> Value:
    """A gated cumulative sum, the shape of a linear attention or a state space."""
    x = tokens(x)
    size, n = x.number(2), r.choice((2, 3))
    h, b, c = g.several(f"{linear(g, x, 4 + 2 * n, r)}.split([4, {n}, {n}], -1)")
    a = g.part("nn.Parameter(torch.rand(4))")
    step = g.do(f"F.softplus({linear(g, h, 4, r)} - {a})")
    state = g.do(f"(({step} * {h}).unsqueeze(-1) * {b}.unsqueeze(2)).cumsum(1)")
    y = g.do(f"({state} * {c}.unsqueeze(2)).sum(-1)")
    if r.random() < 0.5:
        y = g.do(f"{y} + {h} * {g.part('nn.Parameter(torch.randn(4))')}")
    return linear(g, y, size, r)
