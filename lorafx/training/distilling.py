"""Learning from a teacher: its answers beside the labels, and the hidden states that its blocks pass on.

A teacher is a program that does not train. For a program that is to lose parts — its gates are open when training
begins — that is the program itself as it was then, whose tensors it shares until they train. What is learned from
answers is softened by a temperature: Hinton et al. 2015, arXiv 1503.02531, section 2. Hidden states by block: Xia et
al. 2022 (CoFi), arXiv 2204.00408, section 3.2; here block by block over one residual stream, and relative to its power.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError
from ..models.tasks import IGNORED, is_shifted

if TYPE_CHECKING:
    from ..graph.program import Program
    from ..graph.segments import CompiledGraph


class Model(Protocol):
    """The part of a :class:`~lorafx.training.module.RewrittenModel` that distillation needs."""

    program: Program

    @property
    def config(self) -> Any: ...
    def __call__(self, **inputs: Any) -> Any: ...
    def run(self, inputs: dict[str, Any], states: dict[str, Any] | None = None) -> Any: ...
    def graph_of(self, training: bool) -> CompiledGraph: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def to(self, device: torch.device, /) -> Any: ...


@dataclass(frozen=True)
class Teaching:
    """What is learned from ``teacher`` and how much it counts.

    Attributes:
        teacher: the module of another program with the inputs and outputs of the one that learns
        share: the teacher's share of the loss; the labels keep the rest
        temperature: what logits are divided by before they are compared
        hidden: weight of the hidden states' mean squared difference, relative to the teacher's power
    """

    teacher: Model
    share: float
    temperature: float = 2.0
    hidden: float = 0.0

    def check(self, model: Model) -> None:
        """UsageError where ``model`` cannot learn from the teacher: other inputs, outputs or blocks, or nothing to
        learn."""
        ours, theirs = model.program, self.teacher.program
        if not (self.share or self.hidden):
            raise UsageError("a share of 0 and hidden states that weigh 0 teach nothing; give one of them")
        if ours.signature.inputs != theirs.signature.inputs or ours.signature.out_spec != theirs.signature.out_spec:
            raise UsageError(f"{ours.name} cannot learn from {theirs.name}: they have other inputs or outputs")
        if not self.hidden:
            return
        here, there = model.graph_of(True).streams, self.teacher.graph_of(False).streams
        if not here:
            raise UsageError(f"{ours.name} has no blocks that hand on hidden states; leave distill_hidden out")
        if here.keys() != there.keys():
            raise UsageError(
                f"{ours.name} has {len(here)} blocks and its teacher {len(there)}: hidden states are learned block by "
                "block; leave distill_hidden out"
            )

    def loss(
        self,
        inputs: dict[str, Any],
        given: Mapping[str, Any],
        labels: Mapping[str, Tensor],
        states: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """What is added to ``1 - share`` of the labels' loss: a mean over the rows, or over the tokens with a label.

        Args:
            inputs: what the model was called with
            given: its outputs
            labels: by name; positions whose label is -100 teach nothing
            states: the hidden states (rows, tokens, channels) that its blocks handed on, by path
        """
        wanted: dict[str, Tensor] | None = None if states is None else {}
        shown = self._shown(inputs, wanted)
        terms = [self.share * self._answers(given, shown, labels)] if self.share else []
        if states is not None and wanted is not None:
            mask = inputs.get("attention_mask")
            gaps = [_gap(value, wanted[block], mask) for block, value in states.items()]
            terms.append(self.hidden * torch.stack(gaps).mean())
        return torch.stack(terms).sum()

    @torch.no_grad()
    def _shown(self, inputs: dict[str, Any], states: dict[str, Tensor] | None) -> Mapping[str, Any]:
        """The teacher's outputs; ``states`` gets what its blocks hand on."""
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
        if device is not None and next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        return self.teacher.run(inputs, states)

    def _answers(self, given: Mapping[str, Any], shown: Mapping[str, Any], labels: Mapping[str, Tensor]) -> Tensor:
        names = [name for name in given if name.endswith("logits") and isinstance(given[name], Tensor)]
        if not names:
            raise UsageError(f"{self.teacher.program.name} gives no logits to learn; leave distill out")
        terms = [self._softened(given[name], shown[name], labels) for name in names]
        return torch.stack(terms).mean()

    def _softened(self, given: Tensor, shown: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        given, shown = given.float(), shown.float()
        problem = _problem(self.teacher, given, labels)
        if problem == "regression":
            return functional.mse_loss(given, shown)
        given, shown = given / self.temperature, shown / self.temperature
        if problem == "multi_label_classification":
            # Less the teacher's own entropy, so that it is 0 where both agree.
            own = functional.binary_cross_entropy_with_logits(shown, shown.sigmoid())
            return (functional.binary_cross_entropy_with_logits(given, shown.sigmoid()) - own) * self.temperature**2
        target = labels.get("labels")
        if target is not None and target.dim() == given.dim() - 1 > 1:  # a label a token
            if is_shifted(self.teacher.program.source.model):
                given, shown, target = given[..., :-1, :], shown[..., :-1, :], target[..., 1:]
            learned = target != IGNORED
            given, shown = given[learned], shown[learned]
        else:
            given, shown = given.flatten(0, -2), shown.flatten(0, -2)
        gap = functional.kl_div(given.log_softmax(-1), shown.log_softmax(-1), reduction="sum", log_target=True)
        return gap / max(len(given), 1) * self.temperature**2


def _problem(teacher: Model, given: Tensor, labels: Mapping[str, Tensor]) -> str:
    """How transformers' loss of a classifier reads its logits; those of other models are over classes or words."""
    config, target = teacher.config, labels.get("labels")
    if getattr(config, "problem_type", None):
        return str(config.problem_type)
    if target is None or target.dim() == given.dim() - 1 > 1 or not target.is_floating_point():
        return "single_label_classification" if given.shape[-1] > 1 else "regression"
    return "regression" if given.shape[-1] == 1 else "multi_label_classification"


def _gap(given: Tensor, shown: Tensor, mask: Tensor | None) -> Tensor:
    """The squared difference of hidden states (rows, tokens, channels) relative to the teacher's squares."""
    difference, power = (given.float() - shown.float()).square().sum(-1), shown.float().square().sum(-1)
    if mask is not None and mask.shape == power.shape:
        difference, power = difference * mask, power * mask
    return difference.sum() / power.sum().clamp(min=torch.finfo(power.dtype).tiny)
