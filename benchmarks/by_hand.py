"""Decoders in ONNX Runtime without a library: the cache stays where it is computed, and nothing is bound while the
clock runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train import SMOLLM2

#: New tokens after a prompt.
NEW = 64


def answer(prefill: float, rest: float, batch: int, tokens: list[int]) -> dict[str, Any]:
    """What a row says of one prompt."""
    return {"prefill ms": 1e3 * prefill, "tokens/s": batch * (NEW - 1) / rest, "tokens": tokens}


class Onnx:
    """Generation in plain ONNX Runtime, with inputs and outputs bound on the device.

    Bindings are made before the clock runs, for one batch: each step reads the cache that the last one wrote and writes
    the other of two.
    """

    def __init__(self, folder: Path, device: str):
        import onnxruntime
        import torch  # noqa: F401  (it brings the CUDA libraries that ONNX Runtime looks for)

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        settings: Any = [("CUDAExecutionProvider", {"use_tf32": "0"})] if device == "cuda" else ["CPUExecutionProvider"]
        files = [folder / "prefill.onnx", folder / "decode.onnx"]
        files = files if files[0].is_file() else list(folder.rglob("model.onnx"))
        sessions = [onnxruntime.InferenceSession(file, options, providers=settings) for file in files]
        if device == "cuda" and sessions[0].get_providers()[0] != "CUDAExecutionProvider":
            raise SystemExit("ONNX Runtime cannot load its CUDA provider here")
        self.device, self.sessions = device, (sessions[0], sessions[-1])
        self.pasts = [entry for entry in sessions[-1].get_inputs() if len(entry.shape) == 4]
        self.made: dict[tuple[int, int], Any] = {}

    def bind(self, batch: int, length: int) -> Any:
        """Bindings of every step, the tensors that hold the prompt and the next token, and the logits of all steps."""
        import torch

        wide = {"tensor(float16)": torch.float16, "tensor(float)": torch.float32}[self.pasts[0].type]
        # One builder calls the size of heads by a name.
        widths = [size if isinstance(size, int) else SMOLLM2["head_dim"] for *_, size in (e.shape for e in self.pasts)]
        sizes = [(int(entry.shape[1]), width) for entry, width in zip(self.pasts, widths, strict=True)]
        place: dict[str, Any] = {"device": self.device}
        caches = [
            [torch.empty(batch * heads * (length + NEW) * size, dtype=wide, **place) for heads, size in sizes]
            for _ in range(2)
        ]
        prompt, token = (torch.zeros(batch, size, dtype=torch.long, **place) for size in (length, 1))
        vocabulary = self.sessions[0].get_outputs()[0].shape[-1]
        ones = torch.ones(batch * (length + NEW), dtype=torch.long, **place)
        positions = torch.arange(length + NEW, **place)
        steps = []
        for step in range(NEW):
            ids, session = (token, self.sessions[1]) if step else (prompt, self.sessions[0])
            past = length + step - 1 if step else 0
            logits = torch.empty(batch, ids.shape[1], vocabulary, dtype=wide, **place)
            where = positions[past : past + ids.shape[1]].expand(batch, -1).contiguous()
            plain = {
                "input_ids": ids,
                "attention_mask": ones[: batch * (past + ids.shape[1])].view(batch, -1),
                "position_ids": where,
            }
            binding = session.io_binding()
            for entry in session.get_inputs():
                if entry.name in plain:
                    self._bind(binding.bind_input, entry.name, plain[entry.name], plain[entry.name].shape)
            self._bind(binding.bind_output, session.get_outputs()[0].name, logits, logits.shape)
            parts = (caches[step % 2], caches[(step + 1) % 2])
            self._bind_cache(session, binding, sizes, parts, (batch, past, past + ids.shape[1]))
            steps.append((session, binding, logits, where))
        return steps, prompt, token, (caches, ones)

    def _bind_cache(self, session: Any, binding: Any, sizes: Any, caches: Any, shape: tuple[int, int, int]) -> None:
        """Read one cache of this many tokens, unless the graph takes none, and write the other, of this many."""
        batch, past, after = shape
        names = [entry.name for entry in session.get_outputs()][1:]
        takes = len(session.get_inputs()) > len(sizes)
        for number, (heads, size) in enumerate(sizes):
            if takes:
                name = self.pasts[number].name
                self._bind(binding.bind_input, name, caches[0][number], (batch, heads, past, size))
            self._bind(binding.bind_output, names[number], caches[1][number], (batch, heads, after, size))

    def _bind(self, bind: Any, name: str, value: Any, shape: Any) -> None:
        import torch

        kind = {torch.int64: np.int64, torch.float16: np.float16, torch.float32: np.float32}[value.dtype]
        bind(name, self.device, 0, kind, tuple(shape), value.data_ptr())

    def __call__(self, given: np.ndarray[Any, Any]) -> dict[str, Any]:
        import torch

        if given.shape not in self.made:
            self.made = {given.shape: self.bind(*given.shape)}  # one batch at a time is in memory
        steps, prompt, token, _ = self.made[given.shape]
        prompt.copy_(torch.from_numpy(given))
        wait: Callable[[], None] = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        said, prefill, start = [], 0.0, time.perf_counter()
        for number, (session, binding, logits, _) in enumerate(steps):
            session.run_with_iobinding(binding)
            token.copy_(logits[:, -1:].argmax(-1))
            wait()
            said.append(token[0, 0].clone())
            if not number:
                prefill = time.perf_counter() - start
        return answer(prefill, time.perf_counter() - start - prefill, len(given), [int(one) for one in said])
