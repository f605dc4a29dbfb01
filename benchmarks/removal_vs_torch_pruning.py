"""Removing the same channels with lorafx and with Torch-Pruning: parameters left, equality with the masked model, time.

    pip install -e ".[bench]" && python -m benchmarks.removal_vs_torch_pruning

MiniLM without 30 % of each block's neurons and heads, chosen by group magnitude. First their weights are zero
everywhere a reader looks (columns), then only where they are made (rows; biases stay), so that neurons are constants
other than 0.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from examples import assets


def closed_units(program: Any, keep: float) -> dict[str, list[int]]:
    """For each weight that reads units, the input channels of the least important ones."""
    import torch

    from lorafx.methods.masks import dropped, lowest
    from lorafx.passes.magnitude import Magnitude

    step = Magnitude(keep=keep)
    units: Any = step.sites(program).taken
    scores = step.importance(program, units)
    closed = {}
    for unit in units:
        mask = lowest(scores[unit.module], dropped(1 - keep, len(unit.costs)))[torch.from_numpy(unit.of)]
        closed[unit.module] = mask.nonzero().flatten().tolist()
    return closed


def makers(module: str) -> list[str]:
    """The weights that make what ``module`` reads, by BERT's names."""
    if module.endswith("attention.output.dense"):
        return [module.replace("output.dense", f"self.{name}") for name in ("query", "key", "value")]
    return [module.replace("output.dense", "intermediate.dense")]


def masked_model(closed: dict[str, list[int]], rows: bool) -> Any:
    """MiniLM in fp64 with these channels zeroed where they are read, or only where neurons are made."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(assets.minilm()).double().eval()
    with torch.no_grad():
        for module, channels in closed.items():
            if rows and "attention" not in module:
                model.get_submodule(makers(module)[0]).weight[channels] = 0.0
            else:
                model.get_submodule(module).weight[:, channels] = 0.0
    return model


def by_lorafx(model: Any) -> tuple[int, Any, float]:
    """Parameters left, the sliced program, seconds (capture included)."""
    import lorafx
    from lorafx.passes.dead_channels import DeadChannels
    from lorafx.passes.tidy import Tidy
    from lorafx.pipeline import run, to_eval

    started = time.perf_counter()
    program = run(to_eval(lorafx.capture(model)), [DeadChannels(), Tidy()])
    return sum(v.numel() for v in program.root.parameters()), program, time.perf_counter() - started


def by_torch_pruning(model: Any, closed: dict[str, list[int]], inputs: dict[str, Any]) -> tuple[int, Any, float]:
    """The same by Torch-Pruning's dependency graph, told which channels."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    started = time.perf_counter()
    pruned = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=inputs)
    for module, channels in closed.items():
        for name in makers(module):
            layer = pruned.get_submodule(name)
            if layer.out_features == model.get_submodule(name).out_features:  # not gone with one before it
                graph.get_pruning_group(layer, tp.prune_linear_out_channels, idxs=channels).prune()
    return sum(v.numel() for v in pruned.parameters()), pruned.eval(), time.perf_counter() - started


def main() -> None:
    """Measure both ways of both and print the table."""
    import torch

    import lorafx

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=float, default=0.7, help="share of neurons and heads to keep")
    keep = parser.parse_args().keep
    program = lorafx.capture(assets.minilm())
    inputs = dict(program.example)
    closed = closed_units(program, keep)
    print("| zeros | by | parameters left | error, of the scale (fp64) | s |\n|---|---|--:|--:|--:|")
    for rows, zeros in ((False, "columns"), (True, "rows of neurons, columns of heads")):
        masked = masked_model(closed, rows)
        ours, sliced, ours_s = by_lorafx(masked)
        theirs, pruned, theirs_s = by_torch_pruning(masked, closed, inputs)
        with torch.no_grad():
            expected = masked(**inputs).last_hidden_state
            got = sliced.module().eval()(**inputs).last_hidden_state, pruned(**inputs).last_hidden_state
        for name, left, value, seconds in (
            ("lorafx", ours, got[0], ours_s),
            ("Torch-Pruning", theirs, got[1], theirs_s),
        ):
            error = float((value - expected).abs().max() / expected.abs().max())
            print(f"| {zeros} | {name} | {left:,} | {error:.1e} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
