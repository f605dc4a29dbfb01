"""A program as an ordinary ``nn.Module``: a training graph and an evaluation graph over one set of tensors."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from ..base import Method, methods_of
from ..deferred.programs import resident
from ..errors import UsageError
from ..graph.call import by_name, flatten, parameters_of
from ..graph.evaluation import evaluation_form
from ..graph.segments import CompiledGraph, compile_graph
from ..graph.state import MethodState, method_state
from ..graph.tree import copy_tree, get_tensor, own_when_trained
from ..models.sentences import LOSS, in_a_row, side_by_side
from ..models.tasks import IGNORED, count_targets, loss_function, loss_type
from .distilling import Teaching
from .duties import Duties, watch
from .sharding import Block, average, is_sharded, shard_again, units, whole, whole_tensors

if TYPE_CHECKING:
    from ..graph.program import Applied, Program

#: The names that transformers' losses have for labels.
LABELS = ("labels", "start_positions", "end_positions")
#: Problem types whose loss in transformers is a mean over the micro-batch, whatever ``num_items_in_batch`` is.
_MEANS = ("regression", "multi_label_classification")


class RewrittenModel(nn.Module):
    """A rewritten model. Call it like the model it came from: keyword inputs, ``labels`` for the loss.

    ``train()`` and ``eval()`` choose between the two graphs. In training the loss has the methods' penalty in it; a
    loop that computes one of its own adds :meth:`penalty`. Any loop calls :meth:`before_step` and :meth:`after_step`
    around the optimiser's step.
    """

    program: Program
    #: Optimiser steps taken so far. Not a buffer: schedules read it every step, and on a GPU each read would wait.
    clock: Tensor
    #: How many optimiser steps the training will take; schedules read it.
    total_steps: int | None = None
    accepts_loss_kwargs = True
    checkpointing: bool = False
    #: The blocks that run as modules of their own, by path, once :meth:`blocks` was called.
    units: dict[str, Block] | None = None
    #: What a loop owes the methods, and what it has done since the last step.
    duties: Duties
    #: What it learns besides the labels, and from which teacher; see :meth:`learn_from`.
    teaching: Teaching | None = None
    #: What computes in training, and what in evaluation; a class of its own for each program holds them.
    _graphs: ClassVar[Mapping[bool, CompiledGraph]]

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModel:
        """A model with tensors of its own, tied as here, and a program over them; graphs and eager model are shared."""
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        own = {k: v for k, v in self.__dict__.items() if k not in ("program", "duties", "teaching")}
        twin.__dict__.update(copy.deepcopy(own, memo))
        root = copy.deepcopy(self.program.root, memo)
        object.__setattr__(twin, "program", dataclasses.replace(self.program.copy(), root=root))
        twin.duties = watch(twin, [method for method, _ in twin._methods()])
        twin.teaching = self.teaching
        return twin

    def learn_from(self, teacher: Program, share: float = 0.5, temperature: float = 2.0, hidden: float = 0.0) -> None:
        """Learn from a teacher as well, in every training forward with labels: see :class:`.Teaching`.

        ``program.copy()``, taken before training, teaches what this program computes now. UsageError: other inputs,
        outputs or blocks, or nothing to learn.
        """
        self.teaching = Teaching(build_module(teacher).eval(), share, temperature, hidden)
        self.teaching.check(self)

    def train(self, mode: bool = True) -> RewrittenModel:
        """Choose the training graph (or the evaluation graph); what trains from now on changes this program alone."""
        if self.units is None:  # else it trains tensors of its own
            for value in self.parameters():
                if value.requires_grad:
                    own_when_trained(value)
        return super().train(mode)

    def blocks(self) -> list[Block]:
        """The blocks as modules that FSDP2 splits, one at a time: ``fully_shard`` each of them, then the model.

        Call it before the optimiser is made. The model has tensors of its own from now on; :meth:`gather` hands what
        it learned to the program. UsageError where FSDP2 cannot split a tensor.
        """
        if self.units is None:
            tree = copy_tree(self)
            found = units(tree, self._graphs.values())
            self._modules, self._parameters, self._buffers = tree._modules, tree._parameters, tree._buffers
            self.units = found
        return list(self.units.values())

    @torch.no_grad()
    def gather(self) -> None:
        """Give the program what a model split over processes learned. Every process has to call it."""
        shard_again(self)
        for name, held in self.program.learned().items():
            self.program.tensor(name).data = whole(get_tensor(self, name)).detach().to(held.device, copy=True)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the base model."""
        return self.program.config

    def graph_of(self, training: bool) -> CompiledGraph:
        """What computes in training, or in evaluation."""
        return self._graphs[training]

    def run(self, inputs: dict[str, Any], states: dict[str, Any] | None = None) -> Any:
        """The outputs without a loss; ``states`` gets the hidden states that the blocks hand on, by their paths."""
        if self.training and self.program.untrainable:
            raise UsageError(f"{self.program.untrainable}; call eval() first")
        leaves = flatten(self.program, inputs)
        self.duties.carried = None
        if self.training and torch.is_grad_enabled():
            self.duties.ran = True
        if self.units is None and is_sharded(self):
            raise UsageError(f"{self.program.name} is sharded as a whole; fully_shard each of model.blocks() first")
        flat = self._graphs[self.training](
            self, leaves, checkpoint=self.checkpointing and self.training, units=self.units, states=states
        )
        return pytree.tree_unflatten(flat, self.program.signature.out_spec)

    @property
    def loss_type(self) -> str | None:
        """transformers' name of the model's loss. HF Trainer reads it to count the targets of a batch."""
        return loss_type(self.program.source.model)

    def _loss(self, outputs: Any, labels: dict[str, Any], items: Any) -> Tensor:
        function = loss_function(self.program.source.model)
        if function is None:
            raise UsageError(f"{self.program.name} has no loss of its own; compute the loss from its outputs")
        config = self.config
        known = {**labels, **dict(outputs), "pooled_logits": outputs.get("logits"), "config": config}
        known["vocab_size"] = getattr(config.get_text_config(), "vocab_size", None)
        wanted = inspect.signature(function).parameters
        odd = next((name for name in labels if name not in wanted), None)
        if odd is not None:
            raise UsageError(f"{self.program.name}: its loss takes {_label_names(self.program)}, not {odd!r}")
        loss = function(
            **{key: value for key, value in known.items() if key in wanted},
            **({} if items is None else {"num_items_in_batch": items}),
        )
        if items is not None and "pooled_logits" in wanted and config.problem_type in _MEANS:
            return loss * labels["labels"].ne(IGNORED).sum() / items
        return loss

    def _methods(self, hook: str = "") -> Iterator[tuple[Method, Applied]]:
        """The methods; those alone that do something of their own at ``hook``, if given."""
        for method, applied in methods_of(self.program):
            if not hook or getattr(type(method), hook) is not getattr(Method, hook):
                yield method, applied

    def _states(self, hook: str) -> Iterator[tuple[Method, MethodState]]:
        """Each method with its state for ``hook``; what it changes in its tensors stays."""
        for method, applied in self._methods(hook):
            with whole_tensors(self) as tensor:
                yield method, self._state(applied, tensor)

    def _state(self, applied: Applied, tensor: Callable[[str], Tensor]) -> MethodState:
        return method_state(applied, tensor, int(self.clock), self.total_steps)

    def parameter_settings(self) -> dict[str, Mapping[str, float]]:
        """Optimiser settings in which parameters differ from the others, by name (a learning rate of gates, say)."""
        return {
            name: settings
            for method, applied in self._methods()
            for entry in applied.inserted
            for short, settings in method.optimiser().items()
            if (name := entry.tensors.get(short)) is not None
        }

    def parameter_groups(self, **settings: Any) -> list[dict[str, Any]]:
        """The trainable parameters as an optimiser takes them: ``AdamW(model.parameter_groups(lr=1e-3))``.

        ``settings`` hold for all but those that a method sets apart.
        """
        own = self.parameter_settings()
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, value in self.named_parameters():
            if value.requires_grad:
                chosen = {**settings, **own.get(name, {})}
                groups.setdefault(tuple(sorted(chosen.items())), {"params": [], **chosen})["params"].append(value)
        return list(groups.values())

    def penalty(self) -> Tensor | None:
        """What the methods add to the loss, for the current parameters.

        None when no method adds anything, and after a training forward with labels, whose loss has it already: so it is
        always right to add what this returns.
        """
        return self._penalty() if self.duties.carried is None or not self.training else None

    def _penalty(self) -> Tensor | None:
        self.duties.tell("penalty")
        terms = [
            method.penalty(self._state(applied, lambda name: whole(get_tensor(self, name))))
            for method, applied in self._methods("penalty")
        ]
        present = [term for term in terms if term is not None]
        return torch.stack(present).sum() if present else None

    def _with_penalty(self, loss: Tensor, labels: dict[str, Any], items: Any) -> Tensor:
        """``loss`` of a training forward with the penalty in it, once for all micro-batches of ``items`` targets."""
        penalty = self._penalty()
        if penalty is None:
            return loss
        self.duties.carried = penalty.detach()
        return loss + self._by_targets(penalty, labels, items)

    def _by_targets(self, term: Tensor, labels: dict[str, Any], items: Any) -> Tensor:
        """A term of the loss for a micro-batch that is a part of a step's ``items`` targets: its share by targets."""
        return term if items is None else term * (count_targets(self.program.source.model, labels["labels"]) / items)

    @torch.no_grad()
    def before_step(self) -> None:
        """Tell the methods that the gradients are final; call it right before the optimiser's step."""
        self.duties.tell("before_step")
        self._average_statistics()
        for method, state in self._states("before_step"):
            method.before_step(state)

    def _average_statistics(self) -> None:
        """Give every process of a data-parallel group the same statistics, so that all take the same decisions."""
        if distributed.is_available() and distributed.is_initialized():
            average(get_tensor(self, name) for name in self.program.names("statistic"))

    @torch.no_grad()
    def after_step(self) -> None:
        """Tell the methods that the optimiser stepped."""
        self.duties.tell("after_step")
        self.clock.add_(1)
        for method, state in self._states("after_step"):
            method.after_step(state)

    def settled(self) -> bool:
        """Whether no method's schedule is still under way: weights from before its end are not to be kept, or stopped
        at."""
        return not self.unsettled()

    @torch.no_grad()
    def unsettled(self) -> list[str]:
        """The methods whose weights do not yet keep their promises."""
        return [method.pass_name() for method, state in self._states("settled") if not method.settled(state)]

    @torch.no_grad()
    def conclude(self) -> None:
        """Tell the methods that training ended before its last step, so that what they promise holds."""
        for method, state in self._states("conclude"):
            method.conclude(state)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.checkpointing = True

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The name HF Trainer calls :meth:`gradient_checkpointing_enable` by. UsageError for what is not offered."""
        if every_n_layers != 1 or offload:
            raise UsageError("activation checkpointing recomputes every block: every_n_layers is 1, offload is false")
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.checkpointing = False


def _forward(self: RewrittenModel, *args: Any, **kwargs: Any) -> Any:
    inputs = {**by_name(self.program, args, kwargs), **kwargs}
    items = inputs.pop("num_items_in_batch", None)
    targets = {name: inputs.pop(name) for name in LABELS if name in inputs and name not in self.program.example}
    labels = {name: value for name, value in targets.items() if value is not None}
    taught = self.teaching if self.training else None
    if taught is not None and not labels and torch.is_grad_enabled():
        raise UsageError(f"{self.program.name} learns from a teacher in its own loss; give labels, or no teacher")
    states: dict[str, Any] | None = {} if taught is not None and taught.hidden else None
    inputs, sides = in_a_row(inputs) if self.loss_type == LOSS else (inputs, 0)
    outputs = self.run(inputs, states)
    if sides:
        outputs = type(outputs)(**side_by_side(outputs, sides))
    if not labels:
        return outputs
    loss = self._loss(outputs, labels, items)
    if taught is not None:
        lesson = taught.loss(inputs, outputs, labels, states)
        loss = (1 - taught.share) * loss + self._by_targets(lesson, labels, items)
    if self.training:
        loss = self._with_penalty(loss, labels, items)
    return type(outputs)(loss=loss, **outputs)


def _signature(program: Program) -> inspect.Signature:
    """What the eager model takes, so that HF Trainer drops no column that it would use, and the loss's arguments."""
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = dict.fromkeys([*program.example, *parameters_of(program.source.model), *_label_names(program)])
    parameters = [inspect.Parameter("self", keyword)]
    parameters += [inspect.Parameter(name, keyword, default=None) for name in names if name != "self"]
    parameters.append(inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _label_names(program: Program) -> list[str]:
    function = loss_function(program.source.model)
    if function is None:
        return []
    return [name for name in inspect.signature(function).parameters if name in LABELS]


def build_module(program: Program) -> RewrittenModel:
    """The module of ``program``. Its tensors are the program's own objects, so training it trains the program."""
    program = resident(program)
    evaluation = program if program.stage == "eval" else evaluation_form(program)
    graphs: dict[bool, CompiledGraph] = {False: compile_graph(evaluation.graph)}
    graphs[True] = graphs[False] if program.stage == "eval" else compile_graph(program.graph)
    # A class per program, as torch.fx does: `forward` carries the captured inputs by name, which is how HF Trainer
    # learns which columns to keep, and copies of the module keep working because nothing is bound to an instance.
    forward = types.FunctionType(_forward.__code__, _forward.__globals__, "forward", None, _forward.__closure__)
    vars(forward).update(__signature__=_signature(program))
    cls = type(program.name, (RewrittenModel,), {"forward": forward, "_graphs": graphs})
    module: RewrittenModel = cls()
    object.__setattr__(module, "program", program)
    # The evaluation graph shares every tensor, but has inner graphs of its own.
    for name, child in (*evaluation.root.named_children(), *program.root.named_children()):
        module.add_module(name, child)
    for name, value in program.root.named_parameters(recurse=False):
        module.register_parameter(name, value)
    for name, value in program.root.named_buffers(recurse=False):
        module.register_buffer(name, value, persistent=name not in program.root._non_persistent_buffers_set)
    # Belongs to a training, not to the program: rewrites of one program share its tensors.
    module.clock = torch.zeros((), dtype=torch.long)
    module.duties = watch(module, [method for method, _ in module._methods()])
    module.train(program.stage == "train")
    return module
