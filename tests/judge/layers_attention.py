"""Attention in every spelling: fused or by hand, rotary, norms of queries and keys, masks, sinks, learned tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.judge.build import Builder, Unfit, Value
from tests.judge.layers import activation, layer, linear, tokens, width


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention: query heads, key-value heads, channels of queries and keys, of values."""

    query: int
    shared: int
    d: int
    e: int


def _sizes(r: random.Random) -> Heads:
    query = r.choice((1, 2, 2, 3, 4))
    d = r.choice((2, 4, 4))
    return Heads(query, r.choice([n for n in (1, 2, 3, 4) if query % n == 0]), d, r.choice((d, d, d, 1, 3)))


def _in_heads(g: Builder, x: Value, heads: int, d: int, r: random.Random) -> Value:
    spelled = r.choice((f".view({x.size(0)}, {x.size(1)}, {heads}, {d})", f".unflatten(-1, ({heads}, {d}))"))
    moved = r.choice((".transpose(1, 2)", ".permute(0, 2, 1, 3)"))
    return g.do(f"{x}{spelled}{moved}")


def _projections(g: Builder, x: Value, memory: Value, n: Heads, r: random.Random) -> tuple[Value, Value, Value]:
    """Queries, keys and values as (batch, heads, tokens, channels)."""
    kind = r.randrange(6) if memory is x else 5
    plain = n.query == n.shared and n.d == n.e
    if kind == 0 and plain:
        h = linear(g, x, 3 * n.query * n.d, r)
        shape = r.choice((f"{n.query}, 3, {n.d}", f"3, {n.query}, {n.d}"))
        h = g.do(f"{h}.view({x.size(0)}, {x.size(1)}, {shape})")
        if shape.startswith("3"):
            h = g.do(f"{h}.permute(2, 0, 3, 1, 4)")
            q, k, v = g.several(f"{h}.unbind(0)") if r.random() < 0.5 else [g.do(f"{h}[{i}]") for i in range(3)]
        else:
            q, k, v = (g.do(f"{h}[..., {i}, :].transpose(1, 2)") for i in range(3))
        return q, k, v
    if kind in (1, 2):
        sizes = [n.query * n.d, n.shared * n.d, n.shared * n.e]
        flat = g.several(f"{linear(g, x, sum(sizes), r)}.split({sizes}, -1)")
        counts = ((n.query, n.d), (n.shared, n.d), (n.shared, n.e))
        q, k, v = (_in_heads(g, part, *count, r) for part, count in zip(flat, counts, strict=True))
        return q, k, v
    if kind == 3:
        both = linear(g, memory, n.shared * (n.d + n.e), r)
        k, v = g.several(f"{_in_heads(g, both, n.shared, n.d + n.e, r)}.split([{n.d}, {n.e}], -1)")
        return _in_heads(g, linear(g, x, n.query * n.d, r), n.query, n.d, r), k, v
    q = _in_heads(g, linear(g, x, n.query * n.d, r), n.query, n.d, r)
    k = _in_heads(g, linear(g, memory, n.shared * n.d, r), n.shared, n.d, r)
    return q, k, _in_heads(g, linear(g, memory, n.shared * n.e, r), n.shared, n.e, r)


def _norms(g: Builder, q: Value, k: Value, n: Heads, r: random.Random) -> tuple[Value, Value]:
    kind = r.randrange(8)
    if kind > 3:
        return q, k
    if kind == 3:
        return g.do(f"F.normalize({q}, dim=-1, eps=0.1)"), g.do(f"F.normalize({k}, dim=-1, eps=0.1) * 2.0")
    made = (
        f"nn.LayerNorm({n.d}, eps=1e-3)",
        f"nn.RMSNorm({n.d}, eps=1e-3)",
        f"nn.LayerNorm({n.d}, eps=1e-2, bias=False)",
    )[kind]
    first = g.part(made)
    second = first if r.random() < 0.2 else g.part(made)
    return g.do(f"{first}({q})"), g.do(f"{second}({k})")


def _rotary(g: Builder, values: list[Value], n: Heads, r: random.Random) -> list[Value]:
    kind = r.randrange(8)
    if kind > 3 or n.d % 2:
        return values
    part = 2 if kind == 3 and n.d == 4 else n.d
    result = []
    for value in values:
        rotated = value if part == n.d else g.do(f"{value}[..., :{part}]")
        angles = f"torch.arange({value.size(2)}, dtype={value}.dtype)[:, None] * 0.5 ** torch.arange({part // 2})"
        if kind == 1:
            angle = g.do(f"({angles}).repeat_interleave(2, -1)")
            turned = g.do(f"torch.stack([-{rotated}[..., 1::2], {rotated}[..., ::2]], -1).flatten(-2)")
        elif kind == 2:
            angle = g.do(angles)
            a, b = g.several(f"{rotated}.chunk(2, -1)")
            cos, sin = f"{angle}.cos()", f"{angle}.sin()"
            result.append(g.do(f"torch.cat([{a} * {cos} - {b} * {sin}, {b} * {cos} + {a} * {sin}], -1)"))
            continue
        else:
            angle = g.do(f"torch.cat([{angles}] * 2, -1)")
            half = part // 2
            turned = g.do(f"torch.cat([-{rotated}[..., {half}:], {rotated}[..., :{half}]], -1)")
        h = g.do(f"{rotated} * {angle}.cos() + {turned} * {angle}.sin()")
        result.append(h if part == n.d else g.do(f"torch.cat([{h}, {value}[..., {part}:]], -1)"))
    return result


def _shared(g: Builder, value: Value, times: int, r: random.Random) -> Value:
    """Key-value heads once for each query head."""
    if times == 1:
        return value
    if r.random() < 0.5:
        return g.do(f"{value}.repeat_interleave({times}, dim=1)")
    return g.do(f"{value}[:, :, None].expand(-1, -1, {times}, -1, -1).flatten(1, 2)")


def _fused(g: Builder, q: Value, k: Value, v: Value, n: Heads, r: random.Random) -> Value:
    options = ["", ", is_causal=True", ", scale=0.3", ", dropout_p=0.0"]
    if not q.free(2) and not k.free(2):
        t, s = q.number(2), k.number(2)
        mask = g.part(
            r.choice(
                (f"torch.rand({t}, {s}).round().sub(0.1).mul(3)", f"nn.Parameter(torch.randn({n.query}, {t}, {s}))")
            )
        )
        options += [f", attn_mask={mask}", f", attn_mask={mask}"]
    option = r.choice(options)
    if n.query != n.shared:
        if r.random() < 0.4:
            option += ", enable_gqa=True"
        else:
            k, v = _shared(g, k, n.query // n.shared, r), _shared(g, v, n.query // n.shared, r)
    return g.do(f"F.scaled_dot_product_attention({q}, {k}, {v}{option})")


def _by_hand(g: Builder, q: Value, k: Value, v: Value, n: Heads, r: random.Random) -> Value:
    k, v = _shared(g, k, n.query // n.shared, r), _shared(g, v, n.query // n.shared, r)
    scores = g.do(
        r.choice((f"{q} @ {k}.transpose(-1, -2)", f"torch.matmul({q}, {k}.mT) * {n.d**-0.5:.3f}",
                  f"torch.einsum('bhtd,bhsd->bhts', {q}, {k})", f"({q} * 0.5) @ {k}.transpose(2, 3)"))
    )  # fmt: skip
    kind = r.randrange(9)
    if kind == 0:
        scores = g.do(f"torch.tanh({scores} / 5.0) * 5.0")
    elif kind == 1:
        causal = f"torch.ones({q.size(2)}, {k.size(2)}, dtype=torch.bool).triu(1)"
        low = r.choice(("float('-inf')", "torch.finfo(torch.float64).min", "-1e4"))
        scores = g.do(f"{scores}.masked_fill({causal}, {low})")
    elif kind == 2:
        slope = g.part(f"nn.Parameter(torch.rand({n.query}, 1, 1))")
        scores = g.do(f"{scores} - {slope} * torch.arange({k.size(2)}, dtype={k}.dtype)")
    elif kind == 3 and not q.free(2) and not k.free(2):
        scores = g.do(f"{scores} + {g.part(f'nn.Parameter(torch.randn({n.query}, {q.number(2)}, {k.number(2)}))')}")
    elif kind == 4:
        scores = g.do(f"{scores} + {g.part(f'nn.Parameter(torch.randn({n.query}))')}.view(1, -1, 1, 1)")
    if r.random() < 0.15 and kind != 1:  # heads mixed; what masks may be near the largest number
        scores = g.do(f"{g.part(f'nn.Conv2d({n.query}, {n.query}, 1)')}({scores})")
    weights = _weights(g, scores, n, r)
    return g.do(
        r.choice(
            (f"{weights} @ {v}", f"torch.matmul({weights}, {v})", f"torch.einsum('bhts,bhsd->bhtd', {weights}, {v})")
        )
    )


def _weights(g: Builder, scores: Value, n: Heads, r: random.Random) -> Value:
    if r.random() < 0.2:  # a sink: one more score, dropped after the softmax
        sink = g.part(f"nn.Parameter(torch.randn({n.query}))")
        sink = g.do(f"{sink}.reshape(1, -1, 1, 1).expand({scores.size(0)}, -1, {scores.size(2)}, 1)")
        return g.do(f"torch.softmax(torch.cat([{scores}, {sink}], -1), -1)[..., :-1]")
    softmax = f"{scores}.softmax(-1)"
    return g.do(r.choice((softmax, f"F.softmax({scores}, dim=-1)", f"torch.sigmoid({scores})", softmax)))


@layer(9)
def attention(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    n = _sizes(r)
    start, memory = x, x
    if r.random() < 0.3:
        made = g.part(f"nn.{r.choice(('LayerNorm', 'RMSNorm'))}({x.number(2)}, eps=1e-3)")
        start = memory = g.do(f"{made}({x})")
    kind = r.randrange(10)
    if kind == 0:
        queries = g.part(f"nn.Parameter(torch.randn(1, {r.choice((1, 3))}, {x.number(2)}))")
        start = g.do(f"{queries}.expand({x.size(0)}, -1, -1)")
    elif kind == 1:
        learned = g.part(f"nn.Parameter(torch.randn({r.choice((1, 3))}, {x.number(2)}))")
        memory = g.do(f"{learned}.expand({x.size(0)}, -1, -1)")
    elif kind == 2:
        learned = g.part(f"nn.Parameter(torch.randn(1, 2, {x.number(2)}))")
        memory = g.do(f"torch.cat([{learned}.expand({x.size(0)}, -1, -1), {memory}], 1)")
    elif kind == 3:
        memory = g.earlier(r, lambda v: v.rank == 3 and not v.free(2) and v.number(2) > 1)
    q, k, v = _projections(g, start, memory, n, r)
    q, k = _norms(g, q, k, n, r)
    if r.random() < 0.6:
        q, k = _rotary(g, [q, k], n, r)
    if r.random() < 0.1:
        v = activation(g, v, r)
    h = (_fused if r.random() < 0.5 else _by_hand)(g, q, k, v, n, r)
    if r.random() < 0.1:
        h = g.do(f"{h} * {g.part(f'nn.Parameter(torch.randn({n.query}))')}.view(-1, 1, 1)")
    h = g.do(
        r.choice((f"{h}.transpose(1, 2).flatten(2)", f"{h}.permute(0, 2, 1, 3).reshape({h.size(0)}, {h.size(2)}, -1)"))
    )
    if r.random() < 0.15:
        h = g.do(f"{h} * torch.sigmoid({linear(g, start, h.number(2), r)})")
    if r.random() < 0.1:
        return h
    out = linear(g, h, x.number(2), r)
    if r.random() < 0.7 and out.shape == x.shape:
        out = g.do(f"{x} + {out}")
    return out


@layer(1)
def attention_without_heads(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    d = r.choice((3, 4, 6))
    q, k, v = linear(g, x, d, r), linear(g, x, d, r), linear(g, x, width(r), r)
    if r.random() < 0.5:
        h = g.do(f"F.scaled_dot_product_attention({q}, {k}, {v})")
    else:
        bias = g.part("nn.Parameter(torch.randn(1, 1, 1))")
        h = g.do(f"torch.baddbmm({bias}, {q}, {k}.transpose(1, 2), alpha=0.5).softmax(-1) @ {v}")
    return linear(g, h, x.number(2), r) if r.random() < 0.6 else h


@layer(1)
def linear_attention(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    n = Heads(2, 2, 3, 4)
    q, k, v = _projections(g, x, x, n, r)
    state = g.do(f"{k}.softmax(-2).transpose(-1, -2) @ {v}")
    h = g.do(f"({q}.softmax(-1) @ {state}).transpose(1, 2).flatten(2)")
    return linear(g, h, x.number(2), r)


@layer(1)
def module_attention(g: Builder, x: Value, r: random.Random) -> Value:
    """torch's own attention modules, two weights in one module."""
    x = tokens(x)
    size = x.number(2)
    heads = r.choice([n for n in (1, 2, 3, 4) if size % n == 0])
    kind = r.randrange(3)
    if kind == 0 and size <= 12:
        first = r.random() < 0.5
        options = f"batch_first=True, norm_first={first}, dropout=0.0"
        return g.do(f"{g.part(f'nn.TransformerEncoderLayer({size}, {heads}, 8, {options})')}({x})")
    options = r.choice(("", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True"))
    p = g.part(f"nn.MultiheadAttention({size}, {heads}, batch_first=True{options})")
    if kind == 1:
        return g.do(f"{p}({x}, {x}, {x}, need_weights=False)[0]")
    other = g.earlier(r, lambda v: v.rank == 3 and v.shape[2] == size)
    return g.do(f"{x} + {p}({x}, {other}, {other})[0]")


@layer(0.7)
def windows(g: Builder, x: Value, r: random.Random) -> Value:
    """Attention in windows of an image, or of fixed pieces of a text."""
    if x.rank != 3 or x.free(1) or x.number(1) % 2:
        raise Unfit
    x = tokens(x)
    n = x.number(1) // 2
    c = x.number(2)
    h = g.do(f"{x}.view({x.size(0)} * {n}, 2, {c})")
    q, k, v = linear(g, h, 4, r), linear(g, h, 4, r), linear(g, h, c, r)
    h = g.do(f"({q} @ {k}.transpose(1, 2)).softmax(-1) @ {v}")
    return g.do(f"{h}.view({x.size(0)}, {2 * n}, {c})")
