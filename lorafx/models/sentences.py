"""Sentence encoders: a transformers encoder whose tokens are pooled into one vector, as sentence-transformers does.

The pooling is part of the model that is captured, so it is part of what is trained, folded, exported and compared. Its
class is the encoder's own with another output; weights, names and config are those of the plain encoder.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from ..errors import UsageError

#: The task that opens one.
TASK = "sentence-similarity"
#: The name of its loss, in addition to those of transformers.
LOSS = "ForSentenceSimilarity"
#: sentence-transformers' list of what follows the encoder.
MODULES = "modules.json"
_ENCODER, _POOL, _NORMALIZE = "Transformer", "Pooling", "Normalize"
#: The factor of cosines in the loss of pairs, as in sentence-transformers.
_SCALE = 20.0
#: The ways of pooling that are known here, and their names in a sentence-transformers folder.
_MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}


@dataclass
class SentenceOutput(ModelOutput):
    """The output of a sentence encoder: ``sentence_embedding``, (batch, dimensions), and in training its loss."""

    loss: Tensor | None = None
    sentence_embedding: Tensor | None = None


@dataclass(frozen=True)
class Pooling:
    """How the vectors of tokens become one: their mean over the text, or the first token's; of length 1 or not."""

    mode: str = "mean"
    normalise: bool = True

    def __call__(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """One vector for each text, from (batch, length, dimensions) and a mask (batch, length)."""
        if self.mode == "cls":
            pooled = states[:, 0]
        else:
            seen = torch.ones_like(states[..., :1]) if mask is None else mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * seen).sum(1) / seen.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=-1) if self.normalise else pooled


class SentenceEncoder:
    """What an encoder's class is mixed with by :func:`as_encoder`: another output, and a loss of pairs."""

    config: Any
    pooling: Pooling = Pooling()

    @property
    def loss_type(self) -> str:
        """The name of its loss."""
        return LOSS

    @loss_type.setter
    def loss_type(self, value: Any) -> None:  # every transformers model sets one
        pass

    @property
    def loss_function(self) -> Any:
        """The loss of pairs."""
        return pair_loss

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        pass


def pair_loss(sentence_embedding: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The loss of pairs of texts, (pairs, 2, dimensions).

    ``labels`` of (pairs,) are target cosines: the mean squared error. Those of (pairs, 2) are numbers of the two texts:
    each first text is to find its second among all of the batch (cross entropy of cosines times 20; in-batch negatives,
    Henderson et al. 2017, arXiv:1705.00652), where a text that equals its own second, or belongs to the same number, is
    not a negative.
    """
    first, second = nn.functional.normalize(sentence_embedding.float(), dim=-1).unbind(1)
    if labels.is_floating_point():
        losses = ((first * second).sum(-1) - labels).square()
    else:
        scores = _SCALE * first @ second.T
        own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        alike = (labels[:, None] == labels[None]).any(-1) & ~own
        wanted = torch.arange(len(labels), device=labels.device)
        losses = nn.functional.cross_entropy(scores.masked_fill(alike, -torch.inf), wanted, reduction="none")
    if num_items_in_batch is None:
        return losses.mean()
    return losses.sum() * (labels.numel() / len(labels)) / num_items_in_batch


def in_a_row(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Turn texts side by side, (rows, sides, length), into texts one after the other, (rows * sides, length); and how
    many sides there are, 0 where they were one after the other already."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 3:
        return dict(inputs), 0
    return {name: value.flatten(0, 1) for name, value in inputs.items() if value is not None}, ids.shape[1]


def side_by_side(outputs: Mapping[str, Any], sides: int) -> dict[str, Any]:
    """Outputs of texts one after the other as those of texts side by side: (rows, sides, …)."""
    return {name: value.unflatten(0, (-1, sides)) for name, value in outputs.items()}


# ---- folders


def as_encoder(model: nn.Module, pooling: Pooling) -> nn.Module:
    """``model``, changed in place: its outputs are pooled from now on.

    UsageError when it gives no vector for every token of a text.
    """
    kind: Any = type(model)
    taken = inspect.signature(kind.forward)
    config: Any = model.config
    if config.is_encoder_decoder or "input_ids" not in taken.parameters:
        raise UsageError(f"{kind.__name__} gives no vector for every token of a text; take an encoder of texts")

    def forward(self: Any, *args: Any, **kwargs: Any) -> SentenceOutput:
        given = taken.bind(self, *args, **kwargs).arguments
        states = kind.forward(self, *args, **kwargs)[0]
        return SentenceOutput(sentence_embedding=self.pooling(states, given.get("attention_mask")))

    # Its signature is its encoder's.
    vars(forward).update(__signature__=taken)
    own = {"pooling": pooling, "forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    model.__class__ = type(kind.__name__, (SentenceEncoder, kind), own)
    return model


def pooled(model: nn.Module, folder: Path, task: str | None) -> nn.Module:
    """``model`` as a sentence encoder where that is the task asked for, or where no task is named and its folder is one
    of sentence-transformers; else as it is."""
    asked = task == TASK
    bare = getattr(model, "base_model", model) is model and hasattr(model, "config")
    if not asked and (task is not None or not bare):
        return model
    pooling = pooling_of(folder, asked=asked)
    return model if pooling is None else as_encoder(model, pooling)


def pooling_of(folder: Path, *, asked: bool) -> Pooling | None:
    """The pooling of a sentence-transformers folder. Of another folder none, or if one is ``asked`` for the usual one.

    UsageError when one is asked for and the folder has another than is known here, or layers after it.
    """
    if not (folder / MODULES).is_file():
        return Pooling() if asked else None
    try:
        return _read(folder)
    except UsageError:
        if asked:
            raise
        return None  # its encoder can be opened without it


def _read(folder: Path) -> Pooling:
    try:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        kinds = {str(entry["type"]).rpartition(".")[2]: folder / entry["path"] for entry in entries}
        chosen = json.loads((kinds[_POOL] / "config.json").read_text(encoding="utf-8")) if _POOL in kinds else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{folder / MODULES}: no list of modules as sentence-transformers writes it") from None
    odd = next((kind for kind in kinds if kind not in (_ENCODER, _POOL, _NORMALIZE)), None)
    if odd is not None or _POOL not in kinds:
        what = f"has a module {odd}" if odd is not None else "pools nothing"
        raise UsageError(f"{folder / MODULES}: it {what}, which is not known here; train it with sentence-transformers")
    modes = [name for name, key in _MODES.items() if chosen.get(key) or chosen.get("pooling_mode") == name]
    others = [
        key for key, on in chosen.items() if key.startswith("pooling_mode_") and on and key not in _MODES.values()
    ]
    if len(modes) != 1 or others:
        raise UsageError(f"{kinds[_POOL]}: it pools by {', '.join(others) or modes or 'nothing'}; known: mean, cls")
    return Pooling(modes[0], _NORMALIZE in kinds)


def write_modules(model: Any, folder: Path) -> None:
    """Write what sentence-transformers needs to open ``folder`` as the same encoder, where it has no such files."""
    if not isinstance(model, SentenceEncoder) or (folder / MODULES).exists():
        return
    pooling, config = model.pooling, model.config
    paths = {_ENCODER: "", _POOL: f"1_{_POOL}", **({_NORMALIZE: f"2_{_NORMALIZE}"} if pooling.normalise else {})}
    entries = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(paths.items())
    ]
    for path in paths.values():
        (folder / path).mkdir(exist_ok=True)
    modes = {key: pooling.mode == name for name, key in _MODES.items()}
    _write(folder / MODULES, entries)
    _write(folder / paths[_POOL] / "config.json", {"word_embedding_dimension": config.hidden_size, **modes})


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
