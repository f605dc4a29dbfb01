"""A search of masks after training: which heads and neurons a fine-tuned encoder misses least, in the style of Kwon et
al. 2022 (arXiv 2204.09656)."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.frontier_rows import LORA, RECIPES, Run, Trained, kept_program
from benchmarks.rivals import BATCH, Chosen, collator, layers_of, least, sample, sequence_classifier, trained

#: Texts that scales are tuned on; :data:`~benchmarks.rivals.SAMPLE` in the source, which takes four times as long.
TUNED = 512
#: What keeps scales near 1, of the mean of the normal equations' diagonal.
RIDGE = 1e-2


def mask_search(run: Run) -> Trained:
    """The heads and neurons that LoRA, trained to the end, misses least: a search under a budget, without training.

    Importance is the diagonal of the Fisher information of masks over heads and neurons. For every number of heads,
    the most important ones are kept, and neurons for the rest of the budget; the number is taken that loses the least
    importance; then what stays is scaled, :func:`tune`. Source: Kwon et al. 2022, arXiv 2204.09656, sections 4.1 and
    4.3; numbers of weights are the cost, not FLOPs, and its rearrangement of masks (4.2) is left out.
    """
    began = time.perf_counter()
    texts, _ = run.texts()
    model = merged(run.beside[LORA]).to(run.device).eval()
    heads, neurons = fisher(model, sample(run, texts))
    width, hidden = layers_of(model)[0].attention.self.attention_head_size, model.config.hidden_size
    gone = search(heads, neurons, run.budget, 4 * width * hidden, 2 * hidden)
    chosen = {number: {"heads": own[0], "neurons": own[1]} for number, own in enumerate(zip(*gone, strict=True))}
    whole = copy.deepcopy(model)
    mask_out(model, chosen)
    scales = tune(model, whole, chosen, sample(run, texts)[:TUNED])
    if run.keep:
        (run.folder / "removed.json").write_text(json.dumps(chosen), encoding="utf-8")
        (run.folder / "scales.json").write_text(json.dumps(scales), encoding="utf-8")
    before = json.loads((run.beside[LORA] / "score.json").read_text(encoding="utf-8"))
    given = trained(model, run, before["seconds"] + time.perf_counter() - began, before["steps"], {})
    return without(given, [(len(own["heads"]), len(own["neurons"])) for own in chosen.values()], width, hidden)


def without(given: Trained, gone: Sequence[tuple[int, int]], width: int, hidden: int) -> Trained:
    """What is left of the sizes without this many heads (of ``width`` channels) and neurons of each block."""
    from lorafx.reporting.sizes import TOKENS

    weights = sum(heads * width * (4 * hidden + 3) + neurons * (2 * hidden + 1) for heads, neurons in gone)
    flops = sum(heads * width * (8 * hidden + 4 * TOKENS) + neurons * 4 * hidden for heads, neurons in gone)
    given.weights = given.weights[0], given.weights[0] - weights
    given.flops = given.flops[0], given.flops[0] - flops
    # The layers themselves stay as they were: what is masked is never read.
    given.left, given.facts = {}, {"removed": list(gone)}
    return given


def merged(folder: Path) -> Any:
    """transformers' model with what the row of LoRA alone learned."""
    from lorafx.pipeline import merge

    program = merge(kept_program(folder, RECIPES[LORA].passes(1.0)))
    model = sequence_classifier()
    missing, _ = model.load_state_dict(dict(program.root.named_parameters()), strict=False)
    lacking = [name for name in missing if name in dict(model.named_parameters())]
    if lacking:
        raise SystemExit(f"{folder}: the merged program has no {lacking[0]}")
    return model


def _inputs(block: Any) -> tuple[Any, Any]:
    """The layers that read a block's heads and its neurons."""
    return block.attention.output.dense, block.output.dense


@contextmanager
def masked(model: Any, masks: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Within, what reads heads and neurons of each block reads them times a mask (rows, units)."""
    handles = []

    def times(mask: Any) -> Callable[[Any, Any], Any]:
        def hook(_: Any, given: Any) -> Any:
            (value,) = given
            return (value * mask.repeat_interleave(value.shape[-1] // mask.shape[-1], -1).unsqueeze(-2),)

        return hook

    for block, own in zip(layers_of(model), masks, strict=True):
        for layer, mask in zip(_inputs(block), own, strict=True):
            handles.append(layer.register_forward_pre_hook(times(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fisher(model: Any, texts: Sequence[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """For each block, the sum over texts of the squared gradient of a text's loss by the masks of heads, of neurons."""
    import torch

    for value in model.parameters():
        value.requires_grad_(False)
    collate, config = collator(), model.config
    sums = [[0.0, 0.0] for _ in layers_of(model)]
    for begin in range(0, len(texts), BATCH):
        batch = collate(list(texts[begin : begin + BATCH])).to(model.device)
        units = (config.num_attention_heads, config.intermediate_size)
        shape = len(batch["labels"])
        masks: Any = [
            tuple(torch.ones(shape, count, device=model.device, requires_grad=True) for count in units)
            for _ in layers_of(model)
        ]
        with masked(model, masks):
            loss = torch.nn.functional.cross_entropy(
                model(**{name: value for name, value in batch.items() if name != "labels"}).logits,
                batch["labels"],
                reduction="sum",
            )
            loss.backward()
        squares = [[mask.grad.square().sum(0).cpu() for mask in own] for own in masks]
        sums = (
            squares
            if not sums
            else [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, squares, strict=True)]
        )
    return [own[0] for own in sums], [own[1] for own in sums]


def search(
    heads: Sequence[Any], neurons: Sequence[Any], budget: float, of_head: int, of_neuron: int
) -> tuple[list[list[int]], list[list[int]]]:
    """The heads and neurons to remove, block by block, so that at most ``budget`` of the weights stay.

    Args:
        heads: their importance, block by block
        neurons: the same of neurons
        budget: share of all weights to keep
        of_head: numbers in the weights of a head
        of_neuron: the same of a neuron
    """
    import torch

    of_heads, of_neurons = torch.cat(list(heads)).sort().values, torch.cat(list(neurons)).sort().values
    allowed = budget * (len(of_heads) * of_head + len(of_neurons) * of_neuron)
    lost_heads = torch.cat([torch.zeros(1), of_heads.cumsum(0)])
    lost_neurons = torch.cat([torch.zeros(1), of_neurons.cumsum(0)])
    best = (float("inf"), 0, 0)
    for gone in range(len(of_heads) + 1):
        room = allowed - (len(of_heads) - gone) * of_head
        if room < 0:
            continue
        away = max(0, len(of_neurons) - int(room // of_neuron))
        best = min(best, (float(lost_heads[gone] + lost_neurons[away]), gone, away))
    return least(heads, best[1]), least(neurons, best[2])


def mask_out(model: Any, chosen: Chosen) -> None:
    """Nobody reads these heads and neurons any more; nor are they made."""
    import torch

    with torch.no_grad():
        for number, block in enumerate(layers_of(model)):
            width, own = block.attention.self.attention_head_size, chosen[number]
            channels = [head * width + offset for head in own["heads"] for offset in range(width)]
            attention = block.attention.self
            makers = ((attention.query, attention.key, attention.value), (block.intermediate.dense,))
            for reader, makes, gone in zip(_inputs(block), makers, (channels, own["neurons"]), strict=True):
                reader.weight[:, gone] = 0.0
                for layer in makes:
                    layer.weight[gone] = 0.0
                    layer.bias[gone] = 0.0


# ---- tuning: what stays is scaled


def tune(model: Any, whole: Any, chosen: Chosen, texts: Sequence[dict[str, Any]]) -> list[list[list[float]]]:
    """Scale the heads and neurons that stay, in place, so that what each sublayer adds to the residual stream comes
    nearest, in least squares, to what it came to in the ``whole`` model; sublayer by sublayer, from the input on.

    Returns the scales, block by block: of heads, of neurons; 1 where removed.
    """
    import torch

    scales = []
    for number in range(len(layers_of(model))):
        own = []
        for part, kind in enumerate(("heads", "neurons")):
            count = (model.config.num_attention_heads, model.config.intermediate_size)[part]
            gone = torch.zeros(count, dtype=torch.bool)
            gone[chosen[number][kind]] = True
            own.append(_scales(model, whole, number, part, gone, texts))
        scales.append(own)
    return scales


def scale(model: Any, scales: Sequence[Sequence[Sequence[float]]]) -> None:
    """Do again what :func:`tune` did."""
    import torch

    with torch.no_grad():
        for block, own in zip(layers_of(model), scales, strict=True):
            for reader, values in zip(_inputs(block), own, strict=True):
                _times(reader, torch.tensor(values))


def _times(reader: Any, values: Any) -> None:
    reader.weight *= values.to(reader.weight).repeat_interleave(reader.in_features // len(values))


def _scales(model: Any, whole: Any, number: int, part: int, gone: Any, texts: Sequence[dict[str, Any]]) -> list[float]:
    """Solve for one sublayer and scale it; if a scale is beyond ±10, as in the source, all stay as they were."""
    import torch

    reader, units = _inputs(layers_of(model)[number])[part], len(gone)
    with torch.no_grad():
        weight = reader.weight.double()
        square, right = torch.zeros_like(weight.T @ weight), torch.zeros_like(weight[0])
        for begin in range(0, len(texts), BATCH):
            read, missing = _missing(model, whole, number, part, texts[begin : begin + BATCH])
            square += read.T @ read
            right += (read * (missing @ weight)).sum(0)
        # A unit gives the sum over its channels of what is read times a column; scales are sought about 1.
        normal = (square * (weight.T @ weight)).view(units, -1, units, len(right) // units).sum((1, 3))
        stays = ~gone.to(right.device)
        normal, right = normal[stays][:, stays], right.view(units, -1).sum(1)[stays]
        values = torch.ones(units).to(weight)
        if len(right):
            ridge = RIDGE * normal.diagonal().mean() * torch.eye(len(right)).to(right)
            values[stays] += torch.linalg.solve(normal + ridge, right)
        values = values if float(values.abs().max()) <= 10 else torch.ones_like(values)
        _times(reader, values)
    return values.tolist()


def _missing(model: Any, whole: Any, number: int, part: int, texts: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """What the reader of a sublayer reads, and what its sum lacks of the whole model's, token by token, in fp64."""
    batch = collator()(list(texts)).to(model.device)
    (read, residual), (read_whole, residual_whole) = (_seen(one, number, part, batch) for one in (model, whole))
    here, there = (_inputs(layers_of(one)[number])[part] for one in (model, whole))
    return read.double(), (there(read_whole) + residual_whole - here(read) - residual).double()


def _seen(model: Any, number: int, part: int, batch: Any) -> tuple[Any, Any]:
    """What the reader of a sublayer reads, and what its result is added to, token by token (tokens, channels)."""
    import torch

    block, seen = layers_of(model)[number], []
    holder = (block.attention.output, block.output)[part]
    handle = holder.register_forward_pre_hook(lambda _, given: seen.append(given))
    try:
        with torch.no_grad():
            model.bert(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        handle.remove()
    there = batch["attention_mask"].bool()
    read, residual = seen[0]
    return read[there], residual[there]
