"""What a training loop owes the methods of a program, checked where no loop can miss it: at the optimiser's own step.

A method may add to the loss and act around every step. The module's own loss has the penalty in it; a loop that leaves
out the rest, or computes a loss of its own without the penalty, would silently train something else. So a step without
its part is refused, in any loop.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..base import Method
from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from ..graph.program import Program


class Trained(Protocol):
    """The part of a :class:`lorafx.training.module.RewrittenModel` that is watched."""

    program: Program
    duties: Duties

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def penalty(self) -> Tensor | None: ...


_WATCHED: weakref.WeakSet[Trained] = weakref.WeakSet()
_ADVICE = (
    "train with lorafx.train, lorafx.training.Trainer or its LorafxCallback; a loop of your own calls "
    "model.before_step() and model.after_step() around the optimiser's step and adds model.penalty() to its loss"
)


class Duties:
    """What one model's methods are owed, and what has been done since the optimiser's last step."""

    def __init__(self, methods: list[Method]):
        self.penalty, self.before_step, self.after_step = (
            [method.pass_name() for method in methods if getattr(type(method), hook) is not getattr(Method, hook)]
            for hook in ("penalty", "before_step", "after_step")
        )
        #: Training forwards since the last step: a model that took part in none is not what an optimiser trains.
        self.ran = False
        self.done: set[str] = set()
        self.stepped = False
        #: The penalty that the last loss includes, for logs; None when that loss has none yet.
        self.carried: Tensor | None = None

    def tell(self, hook: str) -> None:
        """Note that the loop did its part; after a step the penalty is another one."""
        self.done.add(hook)
        if hook != "penalty":
            self.carried = None

    def check(self, model: Trained) -> None:
        """UsageError when the loop left out a method's part; else the account of the next step begins."""
        owed = [("before_step", self.before_step, "before_step()")]
        if self.stepped:
            owed.append(("after_step", self.after_step, "after_step()"))
        owed.append(("penalty", self.penalty, "penalty() in its loss"))
        for hook, names, what in owed:
            # A penalty of None means that there is nothing to add.
            if names and hook not in self.done and not (hook == "penalty" and model.penalty() is None):
                raise UsageError(f"{model.program.name} is trained without {what}, which {names[0]} needs; {_ADVICE}")
        self.ran, self.stepped = False, True
        self.done.clear()


def watch(model: Trained, methods: list[Method]) -> Duties:
    """The duties towards ``model``, checked from now on whenever an optimiser that holds its parameters steps."""
    duties = Duties(methods)
    if duties.penalty or duties.before_step or duties.after_step:
        _WATCHED.add(model)
    return duties


def _check(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    waiting = [model for model in _WATCHED if model.duties.ran]
    if not waiting:
        return
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for model in waiting:
        if any(id(value) in held for value in model.parameters()):
            model.duties.check(model)


register_optimizer_step_pre_hook(_check)
