"""What the tools of ONNX make of an exported file as it is: the checker, with shape inference, and the quantiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime import InferenceSession
from onnxruntime.quantization import quantize_dynamic

#: What symbolic dimensions are: one text of six tokens, nothing in a cache.
_BATCH, _LENGTH = 1, 6


def feed(session: Any) -> dict[str, np.ndarray]:
    """Inputs of a session, by their names: tokens, a mask of ones, positions, an empty cache, and numbers."""
    ids = np.arange(2, 2 + _LENGTH, dtype=np.int64)[None]
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids - 2}
    known |= {"token_type_ids": np.zeros_like(ids)}
    found = {}
    for value in session.get_inputs():
        cached = [_BATCH if place == 0 else 0 for place in range(len(value.shape))]
        shape = [size if isinstance(size, int) else free for size, free in zip(value.shape, cached, strict=True)]
        found[value.name] = known.get(value.name, np.zeros(shape, dtype=np.float32))
    return found


def accepted(file: Path, beside: Path) -> tuple[int, float]:
    """Check a file in full and quantise it with the tool's own defaults; the bytes that are left, and how far its first
    output is off, as a share of the scale."""
    onnx.checker.check_model(file, full_check=True)
    small = beside / "small.onnx"
    quantize_dynamic(file, small)
    onnx.checker.check_model(small)
    first, second = (InferenceSession(one) for one in (file, small))
    before, after = (np.asarray(session.run(None, feed(session))[0]) for session in (first, second))
    return small.stat().st_size, float(np.abs(before - after).max() / np.abs(before).max())
