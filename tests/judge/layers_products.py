"""Layers of products: head by head, mixtures, values that meet; constants, and writes in place."""

from __future__ import annotations

import random

from tests.judge.build import Builder, Unfit, Value
from tests.judge.layers import activation, layer, linear, tokens, width


@layer(1.5)
def in_heads(g: Builder, x: Value, r: random.Random) -> Value:
    """Products head by head."""
    x = tokens(x)
    heads, d, e = r.choice((2, 3, 4)), r.choice((2, 3, 4)), r.choice((2, 3, 4))
    h = linear(g, x, heads * d, r)
    h = g.do(f"{h}.view({x.size(0)}, {x.size(1)}, {heads}, {d})")
    w = g.part(f"nn.Parameter(torch.randn({heads}, {d}, {e}))")
    kind = r.randrange(7)
    if kind == 0:
        h = g.do(f"torch.einsum('bthd,hde->bthe', {h}, {w})")
    elif kind == 1:
        h = g.do(f"({h}.unsqueeze(-2) @ {w}).squeeze(-2)")
    elif kind == 2:
        h = g.do(f"{h}.permute(2, 0, 1, 3).reshape({heads}, -1, {d})")
        b = g.part(f"nn.Parameter(torch.randn({heads}, 1, {e}))")
        call = r.choice(
            (
                f"torch.bmm({h}, {w})",
                f"torch.baddbmm({b}, {h}, {w})",
                f"torch.baddbmm({b}, {h}, {w}, beta=0.5, alpha=2.0)",
            )
        )
        h = g.do(call)
        h = g.do(f"{h}.view({heads}, {x.size(0)}, {x.size(1)}, {e}).permute(1, 2, 0, 3)")
    elif kind == 3:
        h = g.do(f"{g.part(f'nn.Linear({d}, {e})')}({activation(g, h, r)})")
    elif kind == 4:
        b = g.part(f"nn.Parameter(torch.randn({heads}, {r.choice((1, d))}))")
        h = activation(g, g.do(f"{h} + {b}"), r)
    elif kind == 5:
        h = g.do(f"{h} * {g.part(f'nn.Parameter(torch.randn({heads}))')}[:, None]")
    else:
        h = g.do(f"{g.part(f'nn.LayerNorm({d}, eps=1e-3)')}({h})")
    h = activation(g, h, r)
    end = r.randrange(6)
    if end == 0:
        return linear(g, g.do(f"{h}.sum(2)"), x.number(2), r)
    if end == 1:
        return g.do(f"{g.part(f'nn.Linear({h.number(3)}, {width(r)})')}({h}).mean(2)")
    if end == 2:
        return linear(g, g.do(f"{h}.transpose(2, 3).flatten(2)"), x.number(2), r)
    return linear(g, g.do(f"{h}.flatten(2)"), x.number(2), r)


@layer(1.5)
def unequal_heads(g: Builder, x: Value, r: random.Random) -> Value:
    sizes = [r.choice((1, 2, 3, 4, 5)) for _ in range(r.choice((2, 3)))]
    h = linear(g, x, sum(sizes), r)
    pieces = g.several(f"{h}.split({sizes}, -1)")
    made = []
    for piece, size in zip(pieces, sizes, strict=True):
        kind = r.randrange(4)
        if kind == 0:
            made.append(activation(g, piece, r))
        elif kind == 1:
            made.append(g.do(f"{g.part(f'nn.Linear({size}, {r.choice((2, 3))})')}({piece})"))
        else:
            made.append(piece)
    r.shuffle(made)
    return linear(g, g.do(f"torch.cat([{', '.join(map(str, made))}], -1)"), width(r), r)


@layer(2)
def mixture(g: Builder, x: Value, r: random.Random) -> Value:
    """Experts, all of them computed, weighted by a router."""
    size, experts, hidden = x.number(-1), r.choice((2, 3)), r.choice((4, 6))
    scores = g.do(f"F.softmax({linear(g, x, experts, r)}, -1)")
    kind = r.randrange(4)
    if kind == 0:
        terms = []
        for index in range(experts):
            out = linear(g, activation(g, linear(g, x, hidden, r), r), size, r)
            terms.append(f"{scores}[..., {index}:{index + 1}] * {out}")
        return g.do(" + ".join(terms))
    if kind == 1:
        outs = [linear(g, activation(g, linear(g, x, hidden, r), r), size, r) for _ in range(experts)]
        return g.do(f"(torch.stack([{', '.join(map(str, outs))}], -1) * {scores}.unsqueeze(-2)).sum(-1)")
    x = tokens(x)
    up = g.part(f"nn.Parameter(torch.randn({experts}, {size}, {hidden}) / 2)")
    down = g.part(f"nn.Parameter(torch.randn({experts}, {hidden}, {size}) / 2)")
    if kind == 2:
        h = activation(g, g.do(f"torch.einsum('btc,ecf->btef', {x}, {up})"), r)
        return g.do(f"torch.einsum('btef,efc,bte->btc', {h}, {down}, {scores})")
    flat = g.do(f"{x}.reshape(-1, {size}).expand({experts}, -1, -1)")
    h = activation(g, g.do(f"torch.bmm({flat}, {up})"), r)
    h = g.do(f"torch.bmm({h}, {down}).view({experts}, {x.size(0)}, {x.size(1)}, {size})")
    return g.do(f"({h} * {scores}.permute(2, 0, 1).unsqueeze(-1)).sum(0)")


@layer(1)
def low_rank(g: Builder, x: Value, r: random.Random) -> Value:
    h = linear(g, linear(g, x, r.choice((2, 3)), r, bias=False), x.number(-1), r, bias=False)
    return g.do(f"{x} + {h} * 0.5")


@layer(1)
def product_of_two(g: Builder, x: Value, r: random.Random) -> Value:
    a, b = linear(g, x, 6, r), linear(g, x, 6, r)
    kind = r.randrange(4)
    if kind == 0:
        h = g.do(f"{a} * {b}")
    elif kind == 1:
        h = g.do(f"torch.maximum({a}, {b})")
    elif kind == 2:
        h = g.do(f"({a}.unsqueeze(-1) * {b}.unsqueeze(-2)).flatten(-2)")
    else:
        h = g.do(f"{a} / (1.0 + {b}.square())")
    return linear(g, h, width(r), r)


@layer(1)
def one_channel(g: Builder, x: Value, r: random.Random) -> Value:
    """A value with one channel meets many."""
    kind = r.randrange(7)
    if kind == 0:
        return g.do(f"torch.sigmoid({linear(g, x, 1, r)}) * {x}")
    if kind == 1:
        return g.do(f"{x} - {x}.mean(-1, keepdim=True)")
    if kind == 2:
        gate = g.do(f"F.softmax({linear(g, x, 3, r)}, -1)")
        return g.do(f"{gate}[..., {r.randrange(3)}:][..., :1] * {linear(g, x, width(r), r)}")
    if kind == 3:
        return g.do(f"{linear(g, x, 1, r)} + {linear(g, x, width(r), r)}")
    if kind == 4:
        return linear(g, g.do(f"{linear(g, x, 1, r)}.expand(*{x}.shape[:-1], {width(r)})"), width(r), r)
    if kind == 5:
        return g.do(f"{x} / {x}.norm(dim=-1, keepdim=True).clamp(min=0.5)")
    return g.do(f"{x} - {linear(g, x, 4, r)}.amax(-1, keepdim=True)")


@layer(0.7)
def squeeze_excite(g: Builder, x: Value, r: random.Random) -> Value:
    if x.rank == 3:
        x = tokens(x)
        pooled = g.do(f"{x}.mean(1, keepdim={r.random() < 0.5})")
        gate = linear(g, activation(g, linear(g, pooled, 4, r), r), x.number(2), r)
        gate = g.do(f"torch.sigmoid({gate})")
        return g.do(f"{x} * {gate if gate.rank == 3 else f'{gate}.unsqueeze(1)'}")
    if x.rank != 4:
        raise Unfit
    c = x.number(1)
    gate = g.do(f"{g.part(f'nn.Conv2d({c}, 3, 1)')}({x}.mean((2, 3), keepdim=True))")
    return g.do(f"{x} * torch.sigmoid({g.part(f'nn.Conv2d(3, {c}, 1)')}({activation(g, gate, r)}))")


@layer(0.7)
def zeros_and_constants(g: Builder, x: Value, r: random.Random) -> Value:
    kind = r.randrange(7)
    size = x.number(-1)
    h = linear(g, x, size, r)
    if kind == 0:
        return g.do(f"{x} + {linear(g, g.do(f'{h} - {h}'), size, r)}")
    if kind == 1:
        return g.do(f"{x} + {linear(g, g.do(f'{h} * 0.0'), size, r)}")
    if kind == 2:
        return linear(g, g.do(f"torch.cat([{h}, torch.ones_like({h})[..., :2]], -1)"), size, r)
    if kind == 3:
        return linear(g, g.do(f"torch.cat([{h}, torch.zeros_like({h}), {x}], -1)"), size, r)
    if kind == 4:
        mask = g.part(f"(torch.rand({size}) > 0.4).double()")
        return linear(g, activation(g, g.do(f"{h} * {mask}"), r), width(r), r)
    if kind == 5:
        return g.do(f"{h} + {x} * {g.part(f'nn.Parameter(torch.zeros({size}))')}")
    return linear(g, g.do(f"torch.full_like({h}, 0.5) + {h}"), width(r), r)


@layer(0.7)
def prelu_and_scales(g: Builder, x: Value, r: random.Random) -> Value:
    size = x.number(-1)
    kind = r.randrange(4)
    if kind == 0:
        dim1 = x.number(1)
        return g.do(f"{g.part(f'nn.PReLU({dim1})')}({x})")
    if kind == 1:
        return g.do(f"{x} * {g.part(f'nn.Parameter(torch.randn({size}))')}")
    if kind == 2:
        sizes = [x.number(dim) for dim in range(1, x.rank)]
        return g.do(f"{x} + {g.part(f'nn.Parameter(torch.randn({sizes}))')}")
    a = g.part(f"nn.Parameter(torch.rand({size}) + 0.1)")
    return g.do(f"{x} + torch.tanh({a} * {x}).square() / ({a} + 1e-3)")


@layer(0.7)
def bilinear(g: Builder, x: Value, r: random.Random) -> Value:
    size = x.number(-1)
    if r.random() < 0.5:
        return g.do(f"{g.part(f'nn.Bilinear({size}, 4, {width(r)})')}({x}, {linear(g, x, 4, r)})")
    w = g.part(f"nn.Parameter(torch.randn(4, {size}, 3))")
    return g.do(f"torch.tensordot({x}, {w}, dims=([-1], [1])).flatten(-2)")


@layer(0.7)
def recurrence(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    size, hidden = x.number(2), r.choice((4, 6))
    a, b = g.part(f"nn.Linear({size}, {hidden})"), g.part(f"nn.Linear({hidden}, {hidden})")
    h = g.do(f"torch.tanh({a}({x}[:, 0]))")
    states = [h]
    for step in (1, 2):
        h = g.do(f"torch.tanh({a}({x}[:, {step}]) + {b}({h}))")
        states.append(h)
    return linear(g, g.do(f"torch.stack([{', '.join(map(str, states))}], 1)"), size, r)


# ---- writes in place


@layer(2)
def in_place(g: Builder, x: Value, r: random.Random) -> Value:
    size = x.number(-1)
    kind = r.randrange(14)
    if kind in (0, 1, 2, 3):
        template = g.do(
            r.choice((
                f"torch.zeros_like({x})", f"{x}.new_zeros({x}.shape)", f"torch.empty_like({x}).fill_(0.5)",
                f"torch.zeros({', '.join(x.size(d) for d in range(x.rank))}, dtype={x}.dtype)",
            ))
        )  # fmt: skip
        k = r.randrange(1, size)
        g.run(f"{template}[..., :{k}] = {linear(g, x, k, r)}")
        if r.random() < 0.6:
            g.run(f"{template}[..., {k}:] = {linear(g, x, size - k, r)}")
        return linear(g, template, width(r), r)
    h = linear(g, x, width(r), r)
    size = h.number(-1)
    k = r.randrange(1, size)
    row = g.part(f"nn.Parameter(torch.randn({size}))")
    statements = {
        4: f"{h}[..., :{k}] = 7.0",
        5: f"{h}[:, 0] = 0.0",
        6: f"{h}.add_({row})",
        7: f"{h}[..., {k}:].mul_(2.0)",
        8: f"{h}[..., ::2] += 1.0",
        9: f"{h}[..., {k - 1}].copy_({h}[..., {k}])",
        10: f"{h}[:, :1] = {row}",
        11: f"{h}.clamp_(min=0.0)",
        12: f"{h}.masked_fill_({g.part(f'torch.rand({size}) > 0.5')}, 0.25)",
        13: f"{h}.view(-1)[:2] = 1.0",
    }
    g.run(statements[kind])
    if r.random() < 0.3:
        g.run(f"{h}.mul_({row}).relu_()")
    if r.random() < 0.3:
        h = g.do(f"{h} + 0.0")
    return linear(g, activation(g, h, r), width(r), r) if r.random() < 0.7 else h
