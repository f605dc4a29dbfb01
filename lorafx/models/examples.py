"""Example inputs for a model, and which of their sizes are free."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..errors import ArtifactError, UsageError
from .tasks import loss_type
from .tokenizers import TOKEN_TYPES, find_tokenizer, length_limit, pad_token

#: Height and width of images where neither config nor processor says: what most are trained on.
_USUAL_PIXELS = 224
#: Losses of encoder-decoders that make the decoder's input from the encoder's, and look for its end-of-text tokens.
_DERIVED = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


def example_inputs(model: nn.Module, checkpoint: Path | None = None, batch: int = 2, length: int = 7) -> dict[str, Any]:
    """Example inputs for a transformers model: two rows, one of them padded (an all-ones mask can be traced away)."""
    config = getattr(model, "config", None)
    if config is None:
        raise UsageError(f"{type(model).__name__} has no config to make inputs from; pass inputs={{name: tensor}}")
    try:
        example = _made_up(model, config, checkpoint, batch, length)
    except (AttributeError, TypeError) as error:  # a config that lacks a size, or has one of another kind
        raise UsageError(
            f"no inputs can be made up for {type(model).__name__} ({error}); pass inputs={{name: tensor}}"
        ) from error
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        for name, value in example.items()
    }


def _made_up(model: nn.Module, config: Any, checkpoint: Path | None, batch: int, length: int) -> dict[str, Tensor]:
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or (main not in parameters and "pixel_values" in parameters):
        return {"pixel_values": _pixels(config, checkpoint, batch)}
    if main == "input_features":
        bins, frames = config.num_mel_bins, 2 * config.max_source_positions
        example = {"input_features": torch.randn(batch, bins, frames, generator=_generator())}
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
            ids = torch.randint(config.get_text_config().vocab_size, (batch, length), generator=_generator())
            example["decoder_input_ids"] = ids
        return example
    if not type(model).__name__.endswith("ForMultipleChoice"):
        return _text(model, config, parameters, checkpoint, batch, length)
    choices = _text(model, config, parameters, checkpoint, 2 * batch, length)  # two for each row
    return {name: value.view(batch, 2, length) for name, value in choices.items()}


def _generator() -> torch.Generator:
    # Example inputs never depend on, or disturb, the caller's random state.
    return torch.Generator().manual_seed(0)


def _pixels(config: Any, checkpoint: Path | None, batch: int) -> Tensor:
    """Images of the size the config names; else of the size the folder's image processor makes, or the usual one."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _processed_size(checkpoint) or _USUAL_PIXELS
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=_generator())


def _processed_size(checkpoint: Path | None) -> tuple[int, int] | None:
    file = checkpoint / "preprocessor_config.json" if checkpoint is not None else None
    if file is None or not file.is_file():
        return None
    try:
        processor = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); fetch the checkpoint again") from None
    size = processor.get("crop_size" if processor.get("do_center_crop") else "size") or {}
    if isinstance(size, int):
        return size, size
    edge = size.get("shortest_edge")
    height, width = size.get("height", edge), size.get("width", edge)
    return (height, width) if height and width else None


def _text(
    model: nn.Module, config: Any, parameters: Mapping[str, Any], checkpoint: Path | None, batch: int, length: int
) -> dict[str, Any]:
    text_config = config.get_text_config()
    # A model of characters takes any number.
    top = min(getattr(text_config, "vocab_size", None) or 1000, 1000)
    pad = pad_token(config)
    ids = torch.randint(min(5, top - 1), top, (batch, length), generator=_generator())
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    derived = getattr(config, "is_encoder_decoder", False) and loss_type(model) in _DERIVED
    if derived and text_config.eos_token_id is not None:
        ids = _ended(ids, mask, text_config.eos_token_id)
    if pad is not None:
        # Heads of decoders find the last token by looking for the padding token.
        ids = torch.where(mask.bool(), ids, torch.full_like(ids, pad))
    example = {"input_ids": ids}
    if "attention_mask" in parameters:
        example["attention_mask"] = mask
    if TOKEN_TYPES in parameters and TOKEN_TYPES in _tokenizer_inputs(model, checkpoint):
        example[TOKEN_TYPES] = torch.zeros_like(ids)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters and not derived:
        example["decoder_input_ids"] = ids.flip(1).contiguous()
    return example


def _ended(ids: Tensor, mask: Tensor, end: int) -> Tensor:
    """Texts that end with the end-of-text token and have no other."""
    ids = ids.where(ids != end, ids + 1)
    last = mask.sum(1, keepdim=True) - 1
    return ids.scatter(1, last, end)


def _tokenizer_inputs(model: nn.Module, checkpoint: Path | None) -> list[str]:
    """What the folder's tokenizer returns; nothing when it has none."""
    # Code was trusted where the model itself runs it.
    trusted = getattr(model, "is_remote_code", lambda: False)()
    return list(getattr(find_tokenizer(checkpoint, trust_remote_code=trusted), "model_input_names", ()))


def dynamic_shapes(model: nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """Batch is free in every input; so is the length of texts, up to the model's number of positions, and how many of
    them stand side by side in a row (choices). A size of 1 is none that a tracer can leave free: it stays 1."""
    limit = length_limit(getattr(model, "config", None))
    batch, choices = Dim("batch"), Dim("choices")
    dims = {
        side: Dim(name, max=limit) if limit else Dim(name) for side, name in (("", "sequence"), ("decoder_", "target"))
    }

    def axes(name: str, value: Any) -> dict[int, Dim] | None:
        if not isinstance(value, Tensor):
            return None
        side = "decoder_" if name.startswith("decoder_") else ""
        count = _text_axes(value, example.get(f"{side}input_ids"))
        free = {0: batch, **({1: choices} if count == 3 else {}), **({count - 1: dims[side]} if count > 1 else {})}
        return {axis: dim for axis, dim in free.items() if axis < value.dim() and value.shape[axis] != 1} or None

    return {name: pytree.tree_map(lambda leaf, name=name: axes(name, leaf), value) for name, value in example.items()}


def _text_axes(value: Tensor, ids: Any) -> int:
    """How many of an input's first axes are those of the texts: something for each token has them all."""
    if value.is_floating_point():
        return 1
    if isinstance(ids, Tensor) and value.shape[: ids.dim()] == ids.shape:
        return ids.dim()
    return 2 if value.dim() == 2 else 1
