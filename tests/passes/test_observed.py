"""What flows into weights: over real tokens, for every weight and every use of it, as hooks on the eager model see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lorafx
from lorafx.methods.activations import input_power
from lorafx.public import Program
from tests.small import bert, captured, gpt2, llama


def observed(program: Program) -> dict[str, Tensor]:
    sites = [site for site in program.sites() if site.kind in ("linear", "addmm")]
    return input_power(program, sites, None, "text", 1, 1)


def hooked(program: Program, mask_of: Callable[[str, Tensor], Tensor | None]) -> dict[str, Tensor]:
    """The same from the eager model; ``mask_of`` says which tokens of a module's input are real."""
    model, seen = program.source.model, {}
    parts = {id(module): name for name, module in model.named_modules()}

    def note(module: nn.Module, given: tuple[Tensor, ...], result: object) -> None:
        value = given[0].double()
        mask = mask_of(parts[id(module)], value)
        tokens = value[mask.bool()] if mask is not None else value.flatten(0, -2)
        seen[parts[id(module)]] = tokens.square().mean(0)

    watched = [module for module in model.modules() if isinstance(module, (nn.Linear, hf.pytorch_utils.Conv1D))]
    handles = [module.register_forward_hook(note) for module in watched]
    with torch.no_grad():
        model.eval()(**program.example)
    for handle in handles:
        handle.remove()
    return seen


def agree(program: Program, mask_of: Callable[[str, Tensor], Tensor | None]) -> None:
    names = {site.parameter: site.module for site in program.sites() if site.kind in ("linear", "addmm")}
    found = observed(program)
    assert set(found) == set(names)
    wanted = hooked(program, mask_of)
    for parameter, module in names.items():
        # The eager model is fp32, and computes what enters a deep layer in an order of its own.
        torch.testing.assert_close(found[parameter], wanted[module], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("build", [bert, gpt2, llama], ids=["bert", "gpt2", "llama"])
def test_weights_that_share_an_input_and_padding(build: Any) -> None:
    """Query, key and value read one value; GPT-2's weights read one without a batch dimension."""
    program = captured(build)
    mask = program.example["attention_mask"]
    assert not bool(mask.all())
    agree(program, lambda module, value: mask if value.shape[:-1] == mask.shape else None)


def test_an_encoders_padding_is_not_a_decoders() -> None:
    """Here both have as many tokens; the example's graph knows that their lengths are two."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    program = lorafx.capture(hf.T5ForConditionalGeneration(hf.T5Config(**sizes, dropout_rate=0.0)))
    mask = program.example["attention_mask"]
    assert program.example["decoder_input_ids"].shape == mask.shape
    encoded = (".EncDecAttention.k", ".EncDecAttention.v")  # what of the decoder reads the encoder's result
    agree(program, lambda module, _: mask if module.startswith("encoder") or module.endswith(encoded) else None)


def test_a_weight_used_twice_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * torch.relu(self.layer(x)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4)
    program = lorafx.capture(model, inputs={"x": x}, dynamic=False)
    with torch.no_grad():
        wanted = torch.cat([x, 10 * torch.relu(model.layer(x))]).double().square().mean(0)
    torch.testing.assert_close(observed(program)["layer.weight"], wanted)
