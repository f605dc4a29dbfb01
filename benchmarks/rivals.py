"""What else makes a fine-tuned encoder smaller, on transformers' BERT and with PEFT's LoRA: fewer layers,
Torch-Pruning, and a search of masks after training.

Heads and neurons are removed, as many of each as the budget asks; the residual stream stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import methods
from benchmarks.frontier_rows import BEFORE, FEW, Run, Trained, arguments
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
    """A model of PEFT trained for this many steps, merged; and the seconds. Its adapter is kept if it is wanted."""
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


def started(folder: Path) -> Any:
    """The model that :func:`start` trained, merged."""
    return with_adapter(sequence_classifier(), folder)


def with_adapter(model: Any, folder: Path) -> Any:
    """``model`` with the adapter, and the head, that the run in ``folder`` kept, merged."""
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(model, str(folder / "adapter"))
    return adapted.merge_and_unload().eval()


def torch_pruning(importance: str) -> Callable[[Run], Trained]:
    """LoRA, then the least important heads and neurons leave by Torch-Pruning, then LoRA again for recovery."""

    def row(run: Run) -> Trained:
        from transformers import set_seed

        texts, _ = run.texts()
        steps = run.steps_of(len(texts))
        first = round(BEFORE * steps)
        model = started(run.beside[START]).to(run.device)
        set_seed(run.fold)
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
    kinds = groups.tp.importance
    measures = {
        "magnitude": kinds.GroupMagnitudeImportance,
        "taylor": kinds.GroupTaylorImportance,
        "activation": kinds.ActivationImportance,
    }
    measure = measures[importance]()
    if importance == "taylor":
        gradients(model, texts)
    elif importance == "activation":
        with measure.compute_importance(model), torch.no_grad():
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

    return least([score.index_fill(0, score.argmax(), torch.inf) for score in scores], count)


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


def least(scores: Sequence[Any], count: int) -> list[list[int]]:
    """The places of the ``count`` lowest of all scores, vector by vector."""
    import torch

    order = torch.cat(list(scores)).argsort()[:count].tolist()
    size = len(scores[0])
    return [
        sorted(place - size * number for place in order if place // size == number) for number in range(len(scores))
    ]
