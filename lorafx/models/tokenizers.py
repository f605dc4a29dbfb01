"""A folder's tokenizer, and what configs say of padding and of the longest text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint import open_tokenizer

#: What transformers calls the tokens' types: which of two texts each is of.
TOKEN_TYPES = "token_type_ids"
#: What configs call the longest text: most, those of models that read sound and write text, and MPT's.
_LIMITS = ("max_position_embeddings", "max_target_positions", "max_seq_len")


def is_mask(name: str) -> bool:
    """Whether an input of this name says which tokens are padding: an encoder's or a decoder's."""
    return name.endswith("attention_mask")


def length_limit(*configs: Any) -> int | None:
    """The longest text that models with these configs take, if they have a limit."""
    texts = [config.get_text_config() for config in configs if config is not None]
    limits = [getattr(text, name, None) for text in texts for name in _LIMITS]
    return min((int(limit) for limit in limits if limit and limit > 0), default=None)


def pad_token(*configs: Any) -> int | None:
    """The padding token of the first config that names one; a negative number says that there is none."""
    texts = [config.get_text_config() for config in configs if config is not None]
    # What reads no text may leave the size of its vocabulary open.
    found = ((getattr(text, "vocab_size", None) or 2**31, getattr(text, "pad_token_id", None)) for text in texts)
    return next((pad for size, pad in found if pad is not None and 0 <= pad < size), None)


def find_tokenizer(*folders: Path | None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the first folder that has one; None when none has."""
    for folder in folders:
        if folder is not None and any(folder.glob("tokenizer*")):
            return open_tokenizer(folder, trust_remote_code)
    return None
