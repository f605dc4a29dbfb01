"""What a model is for: the task that opens it, its head, and the loss that trains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..errors import UsageError, did_you_mean

#: Task names (those of transformers' pipelines, and two that those leave to the config) and the Auto class of each.
TASKS = {
    "text-classification": "AutoModelForSequenceClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
    "sentence-similarity": "AutoModel",
}

#: The label of a position that is left out of the loss, as in transformers.
IGNORED = -100

#: What such a task writes into the config, so that the checkpoint is opened for it later.
SETTINGS: dict[str | None, dict[str, Any]] = {
    "multi-label-classification": {"problem_type": "multi_label_classification"},
    "regression": {"problem_type": "regression", "num_labels": 1},
}


def auto_class(task: str) -> Any:
    """The transformers Auto class for ``task``; UsageError for an unknown one."""
    import transformers

    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; known: {', '.join(TASKS)}")
    return getattr(transformers, TASKS[task])


def auto_class_of(config: Mapping[str, Any]) -> str | None:
    """The name of the transformers Auto class that opens a checkpoint with this ``config.json`` as the model it was
    written as (``AutoModelForSequenceClassification``): that of its own code, or of a task; its own class where no Auto
    class does; None where it names none."""
    import transformers
    from transformers.models.auto import modeling_auto

    (name,) = (config.get("architectures") or [None])[:1]
    if name is None:
        return None
    own = next((auto for auto, code in (config.get("auto_map") or {}).items() if str(code).endswith(f".{name}")), None)
    if own is not None:
        return own
    others = [auto for auto in vars(modeling_auto) if auto.startswith("AutoModelFor")]
    for auto in dict.fromkeys((*TASKS.values(), *others)):
        opened = getattr(transformers, auto, None)
        names = getattr(getattr(opened, "_model_mapping", None), "_model_mapping", {}).get(config.get("model_type"), ())
        if name in (names if isinstance(names, (tuple, list)) else (names,)):
            return auto
    return name


def loss_type(model: nn.Module) -> str | None:
    """transformers' name of the loss that trains ``model``; None for a plain module or a pretraining head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # GPT-2's and its contemporaries' class names do not say ForCausalLM, which is where transformers looks.
    default = "ForCausalLM" if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None
    return getattr(model, "loss_type", None) or default


def problem_type(config: Any) -> str:
    """Which problem a classifier with this config solves, as transformers' loss reads its logits; where it names none,
    ``num_labels`` decides."""
    named = getattr(config, "problem_type", None)
    return named or ("regression" if config.num_labels == 1 else "single_label_classification")


def loss_function(model: nn.Module) -> Callable[..., Tensor] | None:
    """The function that computes that loss. An encoder-decoder's does not shift: its labels are aligned with its
    outputs."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    kind = loss_type(model)
    if kind is None:
        return None
    function = model.loss_function if getattr(model, "loss_type", None) else LOSS_MAPPING[kind]
    aligned = getattr(model.config, "is_encoder_decoder", False) and function is LOSS_MAPPING["ForCausalLM"]
    return LOSS_MAPPING["ForMaskedLM"] if aligned else cast(Any, function)


def count_targets(model: nn.Module, labels: Tensor) -> Tensor:
    """How many of ``labels`` count in the loss of ``model``, as HF Trainer counts a batch."""
    return (labels[..., 1:] if is_shifted(model) else labels).ne(IGNORED).sum()


def is_shifted(model: nn.Module) -> bool:
    """Whether an output of ``model`` predicts the label after it, as a causal language model's does."""
    return loss_type(model) == "ForCausalLM" and not getattr(model.config, "is_encoder_decoder", False)


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that gives a transformers model's logits over its vocabulary; None where there is none."""
    found: Any = getattr(model, "get_output_embeddings", None)
    return None if found is None else found()


def head_modules(model: nn.Module, fresh: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Paths of the task head: outside the base model, the last child with parameters, and every other one that the
    checkpoint did not hold (``fresh``); and the output layer wherever it is."""
    base = getattr(model, "base_model", model)
    if base is model or not hasattr(model, "config"):
        return ()
    output = output_layer(model)
    children = [(name, child) for name, child in model.named_children() if child is not base]
    outside = [name for name, child in children if next(child.parameters(), None) is not None]
    heads = [name for name in outside if name == outside[-1] or any(key.startswith(f"{name}.") for key in fresh)]
    if output is not None:
        heads += [name for name, module in model.named_modules() if module is output and name not in heads]
    return tuple(heads)
