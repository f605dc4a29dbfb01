"""When a gather of the columns a weight uses beats multiplying its zero columns too, and what gather-columns decides.

    python -m benchmarks.gather          # in fp32 on the CPU, with 1 and 2 threads
    python -m benchmarks.gather --cuda   # in fp16 on a GPU, as a CUDA graph

ONNX Runtime: MatMul and Add over all columns, against Gather, MatMul and Add over those that are not zero. Interleaved,
medians; the constants of the cost model are fitted to the seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

INPUTS, OUTPUTS = (384, 768, 2048), (384, 1536, 4096)
TOKENS, CUDA_TOKENS = (64, 512, 4096), (512, 4096, 16384)
#: Stands for a GPU where a number of threads is meant.
CUDA = 0
CLOSED, SHARED = (0.1, 0.4, 0.7), (1, 3)
#: Larger products than this (multiply-adds) say nothing new and take seconds.
LARGEST = 6e9


@dataclass(frozen=True)
class Case:
    """One measurement: sizes, and the medians in seconds of both ways. ``threads`` may be :data:`CUDA`."""

    threads: int
    tokens: int
    width: int
    kept: int
    outputs: tuple[int, ...]
    full: float
    gathered: float

    def decided(self, cost: float) -> float:
        """Seconds of the way that the pass takes when gathering an element costs this many multiply-adds."""
        from lorafx.channels.gather import pays

        return self.gathered if pays(self.width, self.kept, self.outputs, cost) else self.full

    @property
    def better(self) -> float:
        """Seconds of the faster way."""
        return min(self.full, self.gathered)


def session(width: int, kept: int | None, outputs: tuple[int, ...], threads: int) -> Any:
    """A model of linear layers that read one input, behind a gather when ``kept`` is given."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    element = np.float16 if threads == CUDA else np.float32
    kind = TensorProto.FLOAT16 if threads == CUDA else TensorProto.FLOAT
    random = np.random.default_rng(0)
    nodes, constants = [], []
    if kept is not None:
        columns = np.sort(random.choice(width, kept, replace=False)).astype(np.int64)
        constants.append(numpy_helper.from_array(columns, "columns"))
        nodes.append(helper.make_node("Gather", ["x", "columns"], ["read"], axis=-1))
    for place, size in enumerate(outputs):
        weight = random.standard_normal((kept or width, size), dtype=np.float32).astype(element)
        constants += [numpy_helper.from_array(weight, f"w{place}"), numpy_helper.from_array(weight[0], f"b{place}")]
        nodes.append(helper.make_node("MatMul", ["read" if kept is not None else "x", f"w{place}"], [f"p{place}"]))
        nodes.append(helper.make_node("Add", [f"p{place}", f"b{place}"], [f"y{place}"]))
    x = helper.make_tensor_value_info("x", kind, [1, "tokens", width])
    ys = [helper.make_tensor_value_info(f"y{p}", kind, [1, "tokens", s]) for p, s in enumerate(outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", [x], ys, constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    if threads == CUDA:
        providers: list[Any] = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
        return ort.InferenceSession(model.SerializeToString(), providers=providers)
    from lorafx.proof.exported import session_options

    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), session_options(threads), providers=providers)


def call(made: Any, tokens: int, width: int, outputs: tuple[int, ...], threads: int) -> Callable[[], Any]:
    """A run on some input, which on a GPU is there already, as is the place of the output."""
    if threads != CUDA:
        x = {"x": np.random.default_rng(1).standard_normal((1, tokens, width), dtype=np.float32)}
        return lambda: made.run(None, x)
    import torch

    from benchmarks.gpu import bound

    place = {"dtype": torch.float16, "device": "cuda"}
    ys = {f"y{number}": torch.empty(1, tokens, size, **place) for number, size in enumerate(outputs)}
    return bound(made, {"x": torch.randn(1, tokens, width, **place)}, ys)


def seconds(actions: list[Callable[[], Any]], budget: float) -> list[float]:
    """The median seconds of each action, interleaved until ``budget`` (s) is spent, 3 rounds at least, 201 at most."""
    for action in actions * 3:
        action()
    taken: list[list[float]] = [[] for _ in actions]
    end = time.perf_counter() + budget
    for turn in range(201):
        if turn >= 3 and time.perf_counter() > end:
            break
        for action, times in zip(actions, taken, strict=True):
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def cases(budget: float, cuda: bool) -> Iterator[Case]:
    """Measure the grid."""
    for threads, width, size, shared in product((CUDA,) if cuda else (1, 2), INPUTS, OUTPUTS, SHARED):
        outputs, multiple = (size,) * shared, 8 if cuda else 1
        widths = [None, *(round(width * (1 - closed) / multiple) * multiple for closed in CLOSED)]
        for tokens in CUDA_TOKENS if cuda else TOKENS:
            if tokens * width * sum(outputs) > LARGEST and not cuda:
                continue
            # One shape a session: a CUDA graph holds no other.
            sessions = [session(width, kept, outputs, threads) for kept in widths]
            full, *gathered = seconds([call(s, tokens, width, outputs, threads) for s in sessions], budget)
            for kept, found in zip(widths[1:], gathered, strict=True):
                yield Case(threads, tokens, width, int(kept or 0), outputs, full, found)


def fitted(found: list[Case]) -> tuple[float, float]:
    """Seconds per multiply-add and per gathered element: medians, the latter of what the former leaves unexplained."""
    per_mac = statistics.median(c.full / (c.tokens * c.width * sum(c.outputs)) for c in found)
    rest = [
        (c.gathered - c.full * c.kept / c.width) / (c.tokens * c.kept) for c in found if sum(c.outputs) == min(OUTPUTS)
    ]
    return per_mac, statistics.median(rest)


def _cost(cuda: bool) -> float:
    from lorafx.channels.gather import CPU_COST, GPU_COST

    return GPU_COST if cuda else CPU_COST


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.8, help="seconds for each size and number of threads")
    parser.add_argument("--cuda", action="store_true", help="on a GPU")
    parser.add_argument("--cost", type=float, help="of gathering an element, in multiply-adds (default: the pass')")
    options = parser.parse_args()
    cost = options.cost or _cost(options.cuda)
    found = list(cases(options.budget, options.cuda))
    print(
        "| threads | tokens | cases | decided right | regret: mean | 95 % below | largest | s per MAC | s per element |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for threads, tokens in [*sorted({(c.threads, c.tokens) for c in found}), ("all", "all")]:
        part = [c for c in found if (c.threads, c.tokens) == (threads, tokens) or threads == "all"]
        right = sum(c.decided(cost) == c.better for c in part) / len(part)
        regret = sorted(c.decided(cost) / c.better - 1 for c in part)
        per_mac, per_element = fitted(part)
        where = f"{'GPU' if threads == CUDA else threads} | {tokens}"
        print(
            f"| {where} | {len(part)} | {right:.0%} | {statistics.mean(regret):.1%} "
            f"| {regret[int(0.95 * len(part))]:.1%} | {regret[-1]:.1%} | {per_mac:.2g} | {per_element:.2g} |"
        )


if __name__ == "__main__":
    main()
