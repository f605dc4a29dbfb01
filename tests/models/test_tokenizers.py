"""What configs say of texts."""

from __future__ import annotations

import transformers as hf

from lorafx.models.tokenizers import length_limit


def test_the_longest_text_is_called_by_several_names() -> None:
    assert length_limit(hf.GPT2Config(n_positions=64)) == 64
    assert length_limit(hf.WhisperConfig(max_target_positions=40, max_source_positions=1500)) == 40
    assert length_limit(hf.MptConfig(max_seq_len=32), hf.GPT2Config(n_positions=64)) == 32
    assert length_limit(hf.BloomConfig(), None) is None
