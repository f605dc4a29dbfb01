"""Layers of linear maps, and the table of all layers."""

from __future__ import annotations

import random

from tests.judge.build import Builder, Layer, Unfit, Value

LAYERS: dict[str, tuple[float, Layer]] = {}


def layer(weight: float = 1.0):
    """Register a layer, drawn in proportion to ``weight``."""

    def register(function: Layer) -> Layer:
        LAYERS[function.__name__] = (weight, function)
        return function

    return register


ACTIVATIONS = (
    "F.relu({})", "F.gelu({})", "torch.tanh({})", "F.silu({})", "torch.sigmoid({})", "F.leaky_relu({}, 0.1)",
    "F.relu({}).square()", "F.softplus({})", "F.elu({})", "torch.atan({})", "{}.clamp(-1.0, 0.5)", "F.hardswish({})",
    "({} + 1.0)", "({} * {}.sigmoid())", "{}",
)  # fmt: skip


def activation(g: Builder, x: Value, r: random.Random) -> Value:
    return g.do(r.choice(ACTIVATIONS).replace("{}", str(x)))


def linear(g: Builder, x: Value, out: int, r: random.Random, bias: bool | None = None) -> Value:
    """A linear layer of the last dimension, in one of its spellings."""
    size = x.number(-1)
    bias = r.random() < 0.75 if bias is None else bias
    kind = r.randrange(8)
    if kind == 0:
        w = g.part(f"nn.Parameter(torch.randn({out}, {size}) / {size**0.5:.2f})")
        b = g.part(f"nn.Parameter(torch.randn({out}))") if bias else None
        return g.do(f"F.linear({x}, {w}{f', {b}' if b else ''})")
    if kind == 1:
        w = g.part(f"nn.Parameter(torch.randn({size}, {out}) / {size**0.5:.2f})")
        b = g.part(f"nn.Parameter(torch.randn({out}))") if bias else None
        return g.do(f"{x} @ {w}{f' + {b}' if b else ''}")
    return g.do(f"{g.part(f'nn.Linear({size}, {out}, bias={bias})')}({x})")


def width(r: random.Random) -> int:
    return r.choice((4, 6, 8, 8, 12))


def tokens(x: Value) -> Value:
    """``x``, if it has the shape (batch, tokens, channels)."""
    if x.rank != 3 or x.free(2) or x.number(2) < 2:
        raise Unfit
    return x


# ---- linear


@layer(3)
def linear_layer(g: Builder, x: Value, r: random.Random) -> Value:
    return activation(g, linear(g, x, width(r), r), r)


@layer(4)
def mlp(g: Builder, x: Value, r: random.Random) -> Value:
    hidden = linear(g, x, r.choice((8, 12, 16)), r)
    if r.random() < 0.2:
        hidden = g.do(f"{g.part('nn.Dropout(0.1)')}({hidden})")
    out = linear(g, activation(g, hidden, r), x.number(-1), r)
    return g.do(f"{x} + {out}") if r.random() < 0.7 else out


@layer(3)
def gated_mlp(g: Builder, x: Value, r: random.Random) -> Value:
    size, hidden = x.number(-1), r.choice((6, 8, 12))
    kind = r.randrange(5)
    if kind == 0:
        gate, up = linear(g, x, hidden, r), linear(g, x, hidden, r)
    else:
        both = linear(g, x, 2 * hidden, r)
        if kind == 1:
            gate, up = g.several(f"{both}.chunk(2, -1)")
        elif kind == 2:
            gate, up = g.several(f"{both}.split({hidden}, -1)")
        elif kind == 3:
            gate, up = g.do(f"{both}[..., ::2]"), g.do(f"{both}[..., 1::2]")
        else:
            gate, up = g.do(f"{both}[..., :{hidden}]"), g.do(f"{both}[..., {hidden}:]")
    product = g.do(f"{activation(g, gate, r)} * {up}")
    out = linear(g, product, size, r)
    return g.do(f"{x} + {out}") if r.random() < 0.7 else out


@layer(1)
def glu(g: Builder, x: Value, r: random.Random) -> Value:
    return linear(g, g.do(f"F.glu({linear(g, x, 2 * width(r), r)}, -1)"), width(r), r)


@layer(1)
def affine_chain(g: Builder, x: Value, r: random.Random) -> Value:
    h = linear(g, x, width(r), r)
    for _ in range(r.choice((1, 2, 2, 3))):
        kind = r.randrange(6)
        if kind == 0:
            h = g.do(f"{h} * 2.0 + 1.0")
        elif kind == 1:
            h = g.do(f"({h} - 0.5) / 3.0")
        elif kind == 2:
            h = g.do(f"{h} * {g.part(f'nn.Parameter(torch.randn({h.number(-1)}))')}")
        elif kind == 3:
            h = g.do(f"-{h} + {g.part(f'nn.Parameter(torch.randn({h.number(-1)}))')}")
        else:
            h = linear(g, h, width(r), r)
    return linear(g, h, width(r), r)


@layer(1)
def same_weight_twice(g: Builder, x: Value, r: random.Random) -> Value:
    size = x.number(-1)
    kind = r.randrange(5)
    p = g.part(f"nn.Linear({size}, {size})")
    if kind == 0:
        return g.do(f"{p}(F.relu({p}({x})))")
    if kind == 1:
        return g.do(f"{p}({x}) + {p}({x}.flip(1))")
    q = g.part(f"nn.Linear({size}, {width(r)})")
    if kind == 2:
        return g.do(f"F.linear(F.relu({q}({x})), {q}.weight.t())")
    if kind == 3:
        return g.do(f"F.relu({q}({x})) @ {q}.weight")
    return g.do(f"torch.cat([{q}({x}), {q}(torch.tanh({p}({x})))], -1)")


@layer(1.5)
def computed_weight(g: Builder, x: Value, r: random.Random) -> Value:
    size, out = x.number(-1), width(r)
    w = g.part(f"nn.Parameter(torch.randn({out}, {size}) / 2)")
    kind = r.randrange(9)
    if kind == 0:
        weight = f"{w} * {g.part(f'(torch.rand({out}, {size}) > 0.5).double()')}"
    elif kind == 1:
        weight = f"{w} * {g.part(f'nn.Parameter(torch.randn({out}, 1))')}"
    elif kind == 2:
        weight = f"{w} * {g.part(f'nn.Parameter(torch.randn({size}))')}"
    elif kind == 3:
        weight = f"{w} / {w}.norm(dim=1, keepdim=True).clamp(min=0.1)"
    elif kind == 4:
        weight = f"torch.cat([{w}, {g.part(f'nn.Parameter(torch.randn(3, {size}))')}])"
    elif kind == 5:
        b, a = g.part(f"nn.Parameter(torch.randn({out}, 2))"), g.part(f"nn.Parameter(torch.randn(2, {size}))")
        weight = f"{w} + {b} @ {a}"
    elif kind == 6:
        weight = f"{w}[:{out - 1}]"
    elif kind == 7:
        weight = f"F.softmax({w}, {r.choice((0, 1))})"
    else:
        weight = f"{w}.view({out // 2}, 2, {size}).flip(1).reshape({out}, {size})"
    if r.random() < 0.5:
        return g.do(f"F.linear({x}, {weight})")
    h = g.do(f"F.linear({x}, {weight})")
    return linear(g, activation(g, h, r), width(r), r)


@layer(1.5)
def addmm(g: Builder, x: Value, r: random.Random) -> Value:
    size, out = x.number(-1), width(r)
    flat = x if x.rank == 2 else g.do(f"{x}.reshape(-1, {size})")
    w = g.part(f"nn.Parameter(torch.randn({size}, {out}) / 2)")
    shapes = [f"({out},)", f"(1, {out})", f"({out},)", "(1, 1)"]
    bias = g.part(f"nn.Parameter(torch.randn{r.choice(shapes)})")
    if r.random() < 0.2:
        bias = str(linear(g, flat, out, r))
    scales = r.choice(("", "", ", alpha=2.0", ", beta=0.5", ", beta=0.5, alpha=-1.5", ", beta=0.0"))
    h = g.do(f"torch.addmm({bias}, {flat}, {w}{scales})")
    if x.rank != 2:
        sizes = [x.size(dim) for dim in range(x.rank - 1)]
        h = g.do(f"{h}.view({', '.join(sizes)}, {out})")
    return linear(g, activation(g, h, r), width(r), r) if r.random() < 0.6 else h
