"""Norms over any axis, convolutions and pools."""

from __future__ import annotations

import random

from tests.judge.build import Builder, Unfit, Value
from tests.judge.layers import activation, layer, linear, tokens, width

# ---- norms


@layer(2)
def norm(g: Builder, x: Value, r: random.Random) -> Value:
    size = x.number(-1)
    affine = r.random() < 0.7
    kind = r.randrange(11)
    eps = r.choice(("1e-3", "1e-2"))
    if kind in (0, 1):
        return g.do(f"{g.part(f'nn.LayerNorm({size}, eps={eps}, elementwise_affine={affine})')}({x})")
    if kind == 2:
        return g.do(f"{g.part(f'nn.RMSNorm({size}, eps={eps}, elementwise_affine={affine})')}({x})")
    if kind == 3:
        w = g.part(f"nn.Parameter(torch.randn({size}))")
        plus = r.choice(("", "1.0 + "))
        return g.do(f"({plus}{w}) * ({x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + {eps}))")
    if kind == 4:
        shape = [x.number(-2), size]
        return g.do(f"{g.part(f'nn.LayerNorm({shape}, eps={eps})')}({x})")
    if kind == 5:
        return g.do(f"F.normalize({x}, dim={r.choice((1, -1))}, eps=0.1)")
    if kind == 6:
        return g.do(f"({x} - {x}.mean(-1, keepdim=True)) / ({x}.var(-1, keepdim=True, unbiased=False) + {eps}).sqrt()")
    if kind == 7:
        return g.do(f"F.softmax({x}, {r.choice((1, -1))})")
    if kind == 8 and x.rank == 3:
        middle = x.number(1)
        return g.do(f"{g.part(f'nn.LayerNorm({middle}, eps={eps})')}({x}.transpose(1, 2)).transpose(1, 2)")
    return g.do(f"{channel_norm(g, x, r)}({x})")


def channel_norm(g: Builder, x: Value, r: random.Random) -> str:
    """A norm whose channels are the second dimension."""
    c = x.number(1)
    kind = r.randrange(4)
    affine = r.random() < 0.7
    if x.rank not in (2, 3, 4) or (x.rank == 2 and kind == 1):
        raise Unfit
    dims = {2: 1, 3: 1, 4: 2}[x.rank]
    if kind == 0:
        groups = r.choice([n for n in (1, 2, 3, 4) if c % n == 0])
        return g.part(f"nn.GroupNorm({groups}, {c}, eps=1e-3, affine={affine})")
    if kind == 1:
        return g.part(f"nn.InstanceNorm{dims}d({c}, eps=1e-3, affine={affine}, track_running_stats={r.random() < 0.3})")
    p = g.part(f"nn.BatchNorm{dims}d({c}, affine={affine})")
    module = g.tensor(p)
    statistics = (f"{p}.running_mean.data.normal_()", f"{p}.running_var.data.uniform_(0.5, 2.0)")
    for statement in statistics:
        exec(statement, {"s": g.root})
        g.parts[-1].append(statement)
    del module
    return p


# ---- convolutions and pools, channels second


def convolution(g: Builder, x: Value, r: random.Random) -> Value:
    """A convolution of any kind over (batch, channels, positions...)."""
    c, spaces = x.number(1), x.rank - 2
    smallest = min(x.samples[0].shape[2:])
    kernel = r.choice([k for k in (1, 2, 3) if k <= smallest])
    out = r.choice((4, 6, 8))
    kind = r.randrange(6)
    groups = 1
    if kind in (0, 1):
        groups = r.choice([n for n in (1, 2, 3, 4) if c % n == 0])
        out = groups * r.choice((1, 2, 3))
    if kind == 2:
        groups, out = c, c * r.choice((1, 1, 2))
    extra = r.choice(
        (
            "",
            f", padding={kernel // 2}",
            ", stride=2",
            f", padding={kernel // 2}, padding_mode='circular'",
            ", dilation=1",
            "",
        )
    )
    transposed = kind == 3
    if transposed:
        extra = r.choice(("", ", stride=2"))
        groups = r.choice([n for n in (1, 1, 2) if c % n == 0])
        out = groups * r.choice((2, 3, 4))
    name = f"nn.Conv{'Transpose' if transposed else ''}{spaces}d"
    return g.do(f"{g.part(f'{name}({c}, {out}, {kernel}{extra}, groups={groups}, bias={r.random() < 0.7})')}({x})")


@layer(2)
def convolutions(g: Builder, x: Value, r: random.Random) -> Value:
    """One or two convolutions with a norm or a pool between them, over whatever stands second."""
    if x.rank not in (3, 4):
        raise Unfit
    h = convolution(g, x, r)
    if r.random() < 0.4:
        h = g.do(f"{channel_norm(g, h, r)}({h})")
    h = activation(g, h, r)
    if r.random() < 0.3:
        h = pooled(g, h, r)
    return convolution(g, h, r) if r.random() < 0.6 else h


@layer(2)
def convolution_over_tokens(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    h = g.do(f"{x}.transpose(1, 2)")
    kind = r.randrange(4)
    if kind == 0:
        c, k = x.number(2), r.choice((2, 3))
        p = g.part(f"nn.Conv1d({c}, {c}, {k}, groups={c}, padding={k - 1})")
        h = g.do(f"{p}({h})[..., :{x.size(1)}]")
    elif kind == 1:
        c, k = x.number(2), r.choice((2, 3))
        p = g.part(f"nn.Conv1d({c}, {width(r)}, {k})")
        h = g.do(f"{p}(F.pad({h}, ({k - 1}, 0)))")
    else:
        h = convolution(g, h, r)
    h = activation(g, h, r)
    if r.random() < 0.3:
        h = convolution(g, h, r)
    return g.do(f"{h}.transpose(1, 2)")


@layer(1.5)
def convolution_2d_over_features(g: Builder, x: Value, r: random.Random) -> Value:
    x = tokens(x)
    h = convolution(g, g.do(f"{x}.unsqueeze(1)"), r)
    h = activation(g, h, r)
    end = r.randrange(4)
    if end == 0:
        return g.do(f"{h}.mean(1)")
    if end == 1:
        return g.do(f"{h}.amax(2)")
    if end == 2:
        return g.do(f"{h}.mean((2, 3))")
    return g.do(f"{h}.permute(0, 2, 1, 3).flatten(2)")


def pooled(g: Builder, x: Value, r: random.Random) -> Value:
    """A pool over the last dimensions."""
    spaces = x.rank - 2
    if spaces not in (1, 2):
        raise Unfit
    return g.do(
        r.choice((
            f"F.max_pool{spaces}d({x}, 2)", f"F.avg_pool{spaces}d({x}, 2)", f"F.avg_pool{spaces}d({x}, 3, 1, 1)",
            f"F.adaptive_avg_pool{spaces}d({x}, {r.choice((1, 2))})", f"F.max_pool{spaces}d({x}, 3, 1, 1)",
            f"F.adaptive_max_pool{spaces}d({x}, 2)", f"F.lp_pool{spaces}d({x}.abs() + 0.1, 2.0, 2)",
        ))
    )  # fmt: skip


@layer(1)
def pool(g: Builder, x: Value, r: random.Random) -> Value:
    if x.rank == 3 and r.random() < 0.5:
        return g.do(f"{pooled(g, g.do(f'{x}.transpose(1, 2)'), r)}.transpose(1, 2)")
    return pooled(g, x, r)


@layer(1)
def as_image(g: Builder, x: Value, r: random.Random) -> Value:
    """Tokens become an image, patches or the other way round."""
    if x.rank == 4:
        kind = r.randrange(4)
        if kind == 0:
            return g.do(f"{x}.flatten(2).transpose(1, 2)")
        if kind == 1:
            c, k = x.number(1), r.choice((1, 2))
            return g.do(f"{g.part(f'nn.Conv2d({c}, {width(r)}, {k}, stride={k})')}({x}).flatten(2).transpose(1, 2)")
        if kind == 2:
            return g.do(f"F.pixel_unshuffle({x}[..., : {x.size(2)} // 2 * 2, : {x.size(3)} // 2 * 2], 2)")
        return g.do(f"F.pixel_shuffle({x}, 2)")
    x = tokens(x)
    c = x.number(2)
    side = r.choice((2, 3))
    h = linear(g, x, side * side * r.choice((1, 2, 3)), r)
    if r.random() < 0.5:
        return g.do(f"{h}.view({x.size(0)}, {x.size(1)}, {side}, {h.number(2) // side})")
    pooled_ = g.do(f"{h}.mean(1)")
    del c
    return g.do(f"{pooled_}.view({x.size(0)}, -1, {side}, {side})")
