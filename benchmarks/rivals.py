"""What else makes a fine-tuned encoder smaller, on transformers' BERT and with PEFT's LoRA: fewer layers,
Torch-Pruning, and a search of masks after training.

Heads and neurons are removed, as many of each as the budget asks; the residual stream stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import methods
from benchmarks.frontier_rows import BEFORE, FEW, LORA, RECIPES, Run, Trained, arguments, kept_program
from examples import assets

#: Texts that gradients and activations are taken of, as in the sources (2,048 and what a GPU holds at once).
SAMPLE, BATCH = 2048, 64

Chosen = dict[int, dict[str, list[int]]]


def sequence_classifier(layers: int | None = None) -> Any:
    """transformers' MiniLM with a head of two classes as drawn now; the first ``layers`` only, if given."""
    from transformers import AutoModelForSequenceClassification

    fewer = {} if layers is None else {"num_hidden_layers": layers}
    return AutoModelForSequenceClassification.from_pretrained(assets.minilm(), num_labels=2, **fewer)


def adapted(model: Any, biases: bool = False) -> Any:
    """``model`` with PEFT's LoRA of rank 8 on the linear layers of its blocks, whose biases train too if asked."""
    from peft import LoraConfig, TaskType, get_peft_model

    bias: Any = "lora_only" if biases else "none"
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=methods.TARGETS, bias=bias)
    return get_peft_model(model, config)


def fitted(run: Run, model: Any, steps: int, seed: int) -> tuple[Any, float]:
    """A model of PEFT trained for so many steps, merged; and the seconds. Its adapter is kept if it is wanted."""
    from transformers import Trainer, TrainingArguments

    texts, _ = run.texts()
    facts = methods.fit(Trainer, model, TrainingArguments(**arguments(run, steps, seed)), texts, collator())
    if run.keep:
        model.save_pretrained(run.folder / "adapter", save_embedding_layers=False)
    return model.merge_and_unload().eval(), facts["seconds"]


def collator() -> Any:
    """Makes a batch of rows."""
    from transformers import AutoTokenizer, DataCollatorWithPadding

    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(assets.minilm()))


def trained(model: Any, run: Run, seconds: float, steps: int, facts: dict[str, Any]) -> Trained:
    """What a model of transformers gives."""
    import torch

    def logits(batch: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(**{name: value.to(model.device) for name, value in batch.items()}).logits.cpu()

    whole = sequence_classifier()
    weights, flops = zip(sizes(whole), sizes(model), strict=True)
    left = {name: (layer.out_features, layer.in_features) for name, layer in linear(model)}
    return Trained(logits, seconds, steps, weights, flops, left, facts)


def linear(model: Any) -> list[tuple[str, Any]]:
    """The linear layers of the encoder's blocks."""
    from torch import nn

    return [
        (name, layer) for name, layer in model.named_modules() if ".layer." in name and isinstance(layer, nn.Linear)
    ]


def sizes(model: Any) -> tuple[int, int]:
    """Numbers in the encoder's blocks, and their FLOPs for one token, as lorafx counts them."""
    from lorafx.reporting.sizes import TOKENS

    weights = sum(value.numel() for name, value in model.named_parameters() if ".layer." in name)
    flops = sum(2 * layer.weight.numel() for _, layer in linear(model))
    flops += sum(4 * TOKENS * layer.out_features for name, layer in linear(model) if name.endswith("self.query"))
    return weights, flops


# ---- fewer layers


def layers_for(budget: float) -> int:
    """How many of MiniLM's six layers come nearest to a share."""
    return max(1, round(6 * budget))


def first_layers(run: Run) -> Trained:
    """LoRA on the first layers alone, all the steps."""
    from transformers import set_seed

    texts, _ = run.texts()
    steps = run.steps_of(len(texts))
    set_seed(run.fold)
    model, seconds = fitted(run, adapted(sequence_classifier(layers_for(run.budget))), steps, run.fold)
    return trained(model, run, seconds, steps, {"layers": layers_for(run.budget)})


# ---- Torch-Pruning


#: The row that the others begin with: LoRA for the first part of the steps.
START = "start"


def start(run: Run) -> Trained:
    """LoRA at full size for the part of the steps before pruning."""
    from transformers import set_seed

    texts, _ = run.texts()
    steps = round(BEFORE * run.steps_of(len(texts)))
    set_seed(run.fold)
    model, seconds = fitted(run, adapted(sequence_classifier()), steps, run.fold)
    return trained(model, run, seconds, steps, {})


def started(folder: Path, seed: int) -> Any:
    """The model that :func:`start` trained, merged."""
    from peft import PeftModel
    from transformers import set_seed

    set_seed(seed)
    model: Any = PeftModel.from_pretrained(sequence_classifier(), str(folder / "adapter"))
    return model.merge_and_unload().eval()


def torch_pruning(importance: str) -> Callable[[Run], Trained]:
    """LoRA, then the least important heads and neurons leave by Torch-Pruning, then LoRA again for recovery."""

    def row(run: Run) -> Trained:
        texts, _ = run.texts()
        steps = run.steps_of(len(texts))
        first = round(BEFORE * steps)
        model = started(run.beside[START], run.fold).to(run.device)
        chosen = pruned(model, importance, run.budget, sample(run, texts))
        if run.keep:
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / "removed.json").write_text(json.dumps(chosen), encoding="utf-8")
        # Another order of the texts than before.
        model, seconds = fitted(run, adapted(model, biases=True), steps - first, run.fold + 5)
        before = json.loads((run.beside[START] / "score.json").read_text(encoding="utf-8"))["seconds"]
        return trained(model, run, before + seconds, steps, {})

    return row


def layers_of(model: Any) -> Sequence[Any]:
    """The encoder's blocks."""
    return model.bert.encoder.layer


class Groups:
    """Torch-Pruning's groups of a BERT: what is removed together, by block.

    Args:
        model: transformers' BERT, on the CPU or a GPU
    """

    def __init__(self, model: Any):
        import torch
        import torch_pruning as tp  # pyright: ignore[reportMissingImports]

        self.model, self.tp = model, tp
        ids = torch.ones(2, 8, dtype=torch.long, device=model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for value in model.parameters():  # what is traced is the backward graph
            value.requires_grad_(True)
        self.graph = tp.DependencyGraph().build_dependency(model, example_inputs=inputs)

    def group(self, layer: Any, channels: Sequence[int] | None = None) -> Any:
        """What goes with these output channels of ``layer``; with all of them by default."""
        every = list(range(layer.out_features)) if channels is None else list(channels)
        return self.graph.get_pruning_group(layer, self.tp.prune_linear_out_channels, idxs=every)

    def remove(self, chosen: Chosen) -> None:
        """Remove heads and neurons, by the numbers of their blocks."""
        for number, block in enumerate(layers_of(self.model)):
            own, width = chosen[number], block.attention.self.attention_head_size
            channels = [head * width + offset for head in own["heads"] for offset in range(width)]
            for layer, gone in ((block.attention.self.query, channels), (block.intermediate.dense, own["neurons"])):
                if gone:
                    self.group(layer, gone).prune()


def pruned(model: Any, importance: str, budget: float, texts: Sequence[dict[str, Any]]) -> Chosen:
    """Remove the least important of all heads and of all neurons, in place: the same share of each.

    Every block keeps one of each, without which Torch-Pruning refuses the block.
    """
    import torch

    groups = Groups(model)
    imports = groups.tp.importance
    kinds = {"magnitude": imports.GroupMagnitudeImportance, "taylor": imports.GroupTaylorImportance}
    measure = kinds.get(importance, getattr(imports, "ActivationImportance", None))()
    if importance == "taylor":
        gradients(model, texts)
    elif importance == "activation":
        with measure.compute_importance(model):
            model.bert(**one_batch(model, texts[: len(texts) // 4]))
    heads, neurons = [], []
    for block in layers_of(model):
        of_channels = measure(groups.group(block.attention.self.query))
        heads.append(of_channels.view(-1, block.attention.self.attention_head_size).mean(1).detach().cpu())
        neurons.append(measure(groups.group(block.intermediate.dense)).detach().cpu())
    gone = [lowest(scores, round((1 - budget) * sum(map(len, scores)))) for scores in (heads, neurons)]
    chosen = {number: {"heads": own[0], "neurons": own[1]} for number, own in enumerate(zip(*gone, strict=True))}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        groups.remove(chosen)
    return chosen


def lowest(scores: Sequence[Any], count: int) -> list[list[int]]:
    """The places of the ``count`` lowest of all scores, vector by vector; the highest of each vector stays."""
    import torch

    return _least([score.index_fill(0, score.argmax(), torch.inf) for score in scores], count)


def sample(run: Run, texts: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The texts that importance is measured on; few of them in a run that is shortened."""
    return texts[: SAMPLE if run.steps is None else FEW]


def one_batch(model: Any, texts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows as one batch on the model's device, without labels."""
    batch = dict(collator()(list(texts)))
    batch.pop("labels")
    return {name: value.to(model.device) for name, value in batch.items()}


def gradients(model: Any, texts: Sequence[dict[str, Any]]) -> None:
    """Leave in the parameters the gradient of the loss, summed over batches of the texts."""
    model.zero_grad(set_to_none=True)
    collate = collator()
    for begin in range(0, len(texts), BATCH):
        batch = collate(list(texts[begin : begin + BATCH])).to(model.device)
        model(**batch).loss.backward()


# ---- a search of masks after training


def mask_search(run: Run) -> Trained:
    """The heads and neurons that LoRA, trained to the end, misses least: a search under a budget, without training.

    Importance is the diagonal of the Fisher information of masks over heads and neurons. For every number of heads,
    the most important ones are kept, and neurons for the rest of the budget; the number is taken that loses the least
    importance. Source: Kwon et al. 2022, arXiv 2204.09656, section 4.1 and algorithm 1; numbers of weights are the
    cost, not FLOPs. Its rearrangement of masks and its tuning (4.2, 4.3) are left out.
    """
    began = time.perf_counter()
    texts, _ = run.texts()
    model = merged(run.beside[LORA]).to(run.device).eval()
    heads, neurons = fisher(model, sample(run, texts))
    block = layers_of(model)[0]
    width, hidden = block.attention.self.attention_head_size, model.config.hidden_size
    gone_heads, gone_neurons = search(heads, neurons, run.budget, 4 * width * hidden, 2 * hidden)
    chosen = {n: {"heads": h, "neurons": f} for n, (h, f) in enumerate(zip(gone_heads, gone_neurons, strict=True))}
    mask_out(model, chosen)
    if run.keep:
        (run.folder / "removed.json").write_text(json.dumps(chosen), encoding="utf-8")
    before = json.loads((run.beside[LORA] / "score.json").read_text(encoding="utf-8"))
    given = trained(model, run, before["seconds"] + time.perf_counter() - began, before["steps"], {})
    lost = [(len(own["heads"]), len(own["neurons"])) for own in chosen.values()]
    numbers = sum(h * (4 * width * hidden + 3 * width) + f * (2 * hidden + 1) for h, f in lost)
    from lorafx.reporting.sizes import TOKENS

    operations = sum(h * (8 * width * hidden + 4 * TOKENS * width) + f * 4 * hidden for h, f in lost)
    given.weights = given.weights[0], given.weights[0] - numbers
    given.flops = given.flops[0], given.flops[0] - operations
    given.facts = {"removed": lost}
    return given


def merged(folder: Path) -> Any:
    """transformers' model with what the row of LoRA alone learned."""
    import lorafx

    program = lorafx.merge(kept_program(folder, RECIPES[LORA].passes(1.0)))
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
def masked(model: Any, masks: Sequence[tuple[Any, Any]]) -> Any:
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
    return _least(heads, best[1]), _least(neurons, best[2])


def _least(scores: Sequence[Any], count: int) -> list[list[int]]:
    """The places of the ``count`` least important of all, block by block."""
    import torch

    order = torch.cat(list(scores)).argsort()[:count].tolist()
    size = len(scores[0])
    return [
        sorted(place - size * number for place in order if place // size == number) for number in range(len(scores))
    ]


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
