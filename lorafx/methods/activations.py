"""The inputs of weights on real texts, measured by running the evaluation graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import UsageError
from ..graph.call import flatten
from ..graph.evaluation import evaluation_form
from ..graph.program import Program
from ..graph.site import Site
from ..models.checkpoint import open_tokenizer
from .input_statistics import mask_of

_BATCH = 8


def input_power(
    program: Program, sites: Iterable[Site], data: str | None, column: str, samples: int, length: int
) -> dict[str, Tensor]:
    """For each site's weight, the mean square of every input channel (in,), over unpadded tokens, fp64.

    Raises:
        UsageError: texts without a tokenizer, or a program without weights
    """
    if program.device.type == "meta":
        raise UsageError("the program was captured without weights; capture it with them to measure activations")
    final = evaluation_form(program)
    wanted = {(site.parameter, site.kind) for site in sites}
    # By use, not by input or weight: weights share inputs, and a weight may be used more than once.
    uses = [site for site in final.sites() if (site.parameter, site.kind) in wanted]
    masks = {site.input: mask_of(final.graph, site.input) for site in uses}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in _batches(program, data, column, samples, length):
        recorder = _Recorder(fx.GraphModule(final.root, final.graph), {*masks, *filter(None, masks.values())})
        with torch.no_grad():
            recorder.run(*flatten(final, batch))
        for site in uses:
            tokens = recorder.seen[site.input.name].double().flatten(0, -2)
            mask = masks[site.input]
            if mask is not None:
                tokens = tokens[recorder.seen[mask.name].flatten().bool()]
            name = site.parameter
            sums[name] = tokens.square().sum(0) + sums.get(name, 0.0)
            counts[name] = counts.get(name, 0) + tokens.shape[0]
    return {weight: total / max(1, counts[weight]) for weight, total in sums.items()}


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]):
        super().__init__(module)
        self.wanted = {node.name for node in wanted}
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = result
        return result


def _batches(program: Program, data: str | None, column: str, samples: int, length: int) -> Iterator[dict[str, Any]]:
    if data is None:
        yield dict(program.example)
        return
    if program.source.path is None:
        raise UsageError("a model from memory has no tokenizer to read texts with; capture a checkpoint folder")
    tokenizer = open_tokenizer(program.source.path, bool(program.source.options.get("trust_remote_code")))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = _texts(Path(data), column)[:samples]
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            texts[start : start + _BATCH], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        yield {name: value for name, value in batch.items() if name in program.signature.inputs}


def _texts(file: Path, column: str) -> list[str]:
    if file.suffix == ".txt":
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    from ..files.table import read_table

    return read_table(file).texts(column)
