"""A random module as source text: layers append lines to a forward, each line runs at once on two samples.

The samples differ in batch and, for token inputs, in length: a dimension whose sizes differ between them is free, and
source text has to say ``v3.shape[1]`` for it. A layer that does not fit what it is given raises, and is left out; so
any part of a plan is a plan, which is all that minimising needs.
"""

from __future__ import annotations

import linecache
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: What the source text of a module may name.
NAMES: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "math": math}
#: Values larger than this (numbers, not scale) only cost time.
_LARGEST = 20_000


class Unfit(Exception):  # noqa: N818  (not an error: a layer that is not for this value)
    """The layer is not for this value."""


@dataclass(frozen=True)
class Value:
    """A value of the module being built: its name in the source text, and two samples of it."""

    name: str
    samples: tuple[Tensor, Tensor]

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return self.samples[0].dim()

    def free(self, dim: int) -> bool:
        """Whether the size of ``dim`` depends on the input."""
        return self.samples[0].shape[dim] != self.samples[1].shape[dim]

    def number(self, dim: int) -> int:
        """The size of a dimension; Unfit where it is free."""
        if self.free(dim):
            raise Unfit
        return self.samples[0].shape[dim]

    def size(self, dim: int) -> str:
        """The size of a dimension as source text."""
        return f"{self}.shape[{dim}]" if self.free(dim) else str(self.samples[0].shape[dim])

    @property
    def shape(self) -> tuple[Any, ...]:
        """Sizes, None where they are free: two values of one shape can be added."""
        return tuple(None if self.free(dim) else size for dim, size in enumerate(self.samples[0].shape))


#: A layer: appends lines to the source text for a value and gives the value they end in.
Layer = Callable[["Builder", Value, random.Random], Value]


@dataclass(frozen=True)
class Plan:
    """What determines a module: the kind of input, layers by name with a seed each, and a seed for zeros.

    Attributes:
        seed: of the graph it began as
        tokens: the input is a table of token numbers of free length, else of numbers of one shape
        layers: pairs of a layer's name and its seed
        closings: which statements that zero something are kept, as pairs of a layer's seed and a number; None for all
        replaced: values that are another value of the same shape instead: the names of both
        result: the value that the module returns instead of its own results
    """

    seed: int
    tokens: bool
    layers: tuple[tuple[str, int], ...]
    closings: frozenset[tuple[int, int]] | None = None
    replaced: tuple[tuple[str, str], ...] = ()
    result: str = ""


class Builder:
    """The source text of one module while it grows."""

    def __init__(self, plan: Plan, example: Callable[[int, int], Tensor]):
        self.parts: list[list[str]] = []
        self.lines: list[str] = []
        self.names: list[dict[str, Any]] = []
        self.layers = nn.ModuleList()
        self.root = nn.Module()
        self.root.layers = self.layers
        samples = (example(2, 3), example(3, 6))  # no shorter text may come
        self.names = [{**NAMES, "s": self.root, "x": sample} for sample in samples]
        self.values = [Value("x", samples)]
        self.seeds: list[int] = []

    def add(self, layer: Layer, name: str, seed: int) -> bool:
        """Append a layer to the latest value; whether it fitted."""
        marks = len(self.lines), len(self.values)
        self.layers.append(nn.Module())
        self.parts.append([f"# {name}", f"torch.manual_seed({seed % 2**31})"])
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed % 2**31)
                value = layer(self, self.values[-1], random.Random(seed))
                self._check(value)
        except (Unfit, RuntimeError, ValueError, IndexError):
            del self.lines[marks[0] :]
            del self.values[marks[1] :]
            del self.layers[-1]
            self.parts.pop()
            return False
        self.lines.insert(marks[0], f"# {name}")
        self.seeds.append(seed)
        del self.values[marks[1] :]
        self.values.append(value)
        return True

    def _check(self, value: Value) -> None:
        for sample in value.samples:
            fits = sample.dtype == torch.float64 and 1 < sample.numel() <= _LARGEST and sample.dim() >= 2
            if not fits or not bool(sample.isfinite().all()) or float(sample.abs().max()) > 1e4:
                raise Unfit
        if value.samples[0].shape[0] != 2 or value.samples[1].shape[0] != 3:
            raise Unfit

    def part(self, source: str, name: str = "") -> str:
        """A module or parameter of the layer, made by ``source``; gives how the source text calls it."""
        owner = self.layers[-1]
        count = len(self.parts[-1])
        name = name or ("w" if "Parameter" in source else "p") + str(count - 2)
        made = eval(source, dict(NAMES))
        learned = isinstance(made, nn.Parameter)
        if isinstance(made, nn.Module):
            made = made.double().eval()
            setattr(owner, name, made)
        else:
            made = made.double() if made.is_floating_point() else made
            if learned:
                made = nn.Parameter(made.data)
                owner.register_parameter(name, made)
            else:
                owner.register_buffer(name, made)
        where = f"layers[{len(self.layers) - 1}].{name}"
        if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
            self.parts[-1].append(f"s.{where.rpartition('.')[0]}.register_buffer({name!r}, {source})")
        else:
            self.parts[-1].append(f"s.{where} = {source}")
        return f"s.{where}"

    def do(self, source: str) -> Value:
        """Append ``name = source``."""
        name = f"v{len(self.lines)}"
        made = []
        for names in self.names:
            names[name] = eval(source, names)
            made.append(names[name])
        self.lines.append(f"{name} = {source}")
        if not isinstance(made[0], Tensor):
            return [self.pick(name, index) for index in range(len(made[0]))]  # type: ignore[return-value]
        value = Value(name, (made[0], made[1]))
        self.values.append(value)
        return value

    def pick(self, name: str, index: int) -> Value:
        """The value that source text names ``name[index]``."""
        return Value(f"{name}[{index}]", tuple(names[name][index] for names in self.names))  # type: ignore[arg-type]

    def several(self, source: str) -> list[Value]:
        """Append a line that gives several values."""
        return self.do(source)  # type: ignore[return-value]

    def run(self, statement: str) -> None:
        """Append a statement that gives nothing, such as a write in place."""
        for names in self.names:
            exec(statement, names)
        self.lines.append(statement)

    def close(self, plan: Plan) -> list[tuple[int, int]]:
        """Zero rows, columns and entries at random, as far as the plan keeps them; the keys of what was zeroed."""
        done = []
        for index, (seed, part) in enumerate(zip(self.seeds, self.parts, strict=True)):
            statements = closings(f"s.layers[{index}]", self.layers[index], random.Random(f"{seed} closed"))
            for number, statement in enumerate(statements):
                if plan.closings is None or (seed, number) in plan.closings:
                    exec(statement, {**NAMES, "s": self.root})
                    part.append(statement)
                    done.append((seed, number))
        return done

    def tensor(self, name: str) -> Tensor:
        """The tensor or module that source text calls ``name``."""
        return eval(name, {"s": self.root})

    def earlier(self, r: random.Random, fits: Callable[[Value], bool]) -> Value:
        """A random earlier value that fits; Unfit when there is none."""
        found = [value for value in self.values[:-1] if value.samples[0].is_floating_point() and fits(value)]
        if not found:
            raise Unfit
        return r.choice(found[-4:])


def _pattern(r: random.Random, size: int) -> list[int]:
    """Some of ``size`` indices: scattered, a run, every so many, or one."""
    kind = r.randrange(5)
    if kind == 0:
        return sorted(r.sample(range(size), max(1, size // 2)))
    if kind == 1:
        length = max(1, size // r.choice((2, 3, 4)))
        start = r.randrange(0, size, length)
        return list(range(start, min(size, start + length)))
    if kind == 2:
        step = r.choice((2, 3, 4))
        return list(range(r.randrange(step), size, step))
    if kind == 3:
        return list(range(size)) if r.random() < 0.15 else list(range(1, size))
    return [r.randrange(size)]


def closings(name: str, layer: nn.Module, r: random.Random) -> list[str]:
    """Statements that zero rows, columns and entries of a layer's tensors; biases of zero rows become constants."""
    tensors, patterns, result = dict(layer.named_parameters()), {}, []

    def pattern(size: int) -> list[int]:
        if size not in patterns or r.random() < 0.4:
            patterns[size] = _pattern(r, size)
        return patterns[size]

    for key, value in tensors.items():
        where = f"{name}.{key}.data"
        if value.dim() >= 2 and value.shape[0] > 1 and r.random() < 0.55:
            rows = pattern(value.shape[0])
            result.append(f"{where}[{rows}] = 0.0")
            bias = key.replace("weight", "bias")
            if bias != key and bias in tensors and len(tensors[bias]) == len(value) and r.random() < 0.8:
                result.append(f"{name}.{bias}.data[{rows}] = {r.choice((0.0, 0.0, 0.5, -0.25))}")
        if value.dim() >= 2 and value.shape[1] > 1 and r.random() < 0.35:
            result.append(f"{where}[:, {pattern(value.shape[1])}] = 0.0")
        if value.dim() == 1 and "weight" in key and value.shape[0] > 1 and r.random() < 0.3:
            entries = pattern(value.shape[0])
            result.append(f"{where}[{entries}] = 0.0")
            bias = key.replace("weight", "bias")
            if bias in tensors and len(tensors[bias]) == len(value) and r.random() < 0.6:
                result.append(f"{name}.{bias}.data[{entries}] = {r.choice((0.0, 0.5))}")
    matrices = [key for key, value in tensors.items() if value.dim() >= 2]
    if matrices and r.random() < 0.3:  # a branch ends with the last of them, mostly: all of it is closed
        result.append(f"{name}.{matrices[-1]}.data[:] = 0.0")
    return result


def _named(statement: str) -> str:
    """What a statement about a part calls it in the forward: ``s.layers[0].p1``."""
    buffer = re.match(r"(s\.layers\[\d+\])\.register_buffer\('(\w+)'", statement)
    found = buffer or re.match(r"(s\.layers\[\d+\])\.(\w+)", statement)
    return f"{found[1]}.{found[2]}" if found else ""


def _live(lines: list[str], replaced: dict[str, str]) -> list[str]:
    """Lines with some values replaced by others, without those that compute what nobody reads."""

    def renamed(found: re.Match[str]) -> str:
        name = found[0]
        while name in replaced:
            name = replaced[name]
        return name

    kept: list[str] = []
    for line in reversed(lines):
        name = line.partition(" = ")[0]
        if line.startswith("#") or name in replaced:
            continue
        read = re.findall(r"\bv\d+\b", " ".join(kept))
        target = re.match(r"v\d+", line)
        if not target or renamed(target) in read:
            kept.insert(0, re.sub(r"\bv\d+\b", renamed, line))
    return kept


class Generated(nn.Module):
    """A random module. Its ``source`` is a script that makes the same module from nothing."""

    def __init__(self, builder: Builder, plan: Plan, results: list[Value]):
        super().__init__()
        self.layers = builder.layers
        self.plan = plan
        result = str(results[0]) if len(results) == 1 else "(" + ", ".join(map(str, results)) + ")"
        body = _live([*builder.lines, f"return {plan.result or result}"], dict(plan.replaced))
        self.body = body
        code = "def forward(s, x):\n" + "\n".join(f"    {line}" for line in body)
        file = f"<graph {plan.seed}>"
        linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # tracebacks show the lines
        names = dict(NAMES)
        exec(compile(code, file, "exec"), names)
        self.run = names["forward"]
        used = [[line for line in part if line[:2] != "s." or _named(line) in code] for part in builder.parts]
        parts = [line for part in used if len(part) > 2 for line in part]
        made = [
            "super().__init__()",
            f"s.layers = nn.ModuleList(nn.Module() for _ in range({len(builder.layers)}))",
            *parts,
        ]
        text = ["class Failing(nn.Module):", "    def __init__(s):", *(f"        {line}" for line in made)]
        text += ["    def forward(s, x):", *(f"        {line}" for line in body)]
        self.source = "\n".join(text)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)
