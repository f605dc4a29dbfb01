"""The only class that changes a graph. It keeps names, roles, fake-tensor metadata and provenance right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..errors import OperatorError
from .effects import has_effect
from .fake import FakeValues
from .initial import initial_value
from .program import Inserted, Step
from .site import INSERTED_BY, INSERTED_FOR, WEIGHT_OPS
from .tensors import TensorIndex
from .tree import below, get_tensor, has_tensor, named_tensors

if TYPE_CHECKING:
    from .program import Program
    from .site import Site

aten = torch.ops.aten


class Edit:
    """Changes one program on behalf of one pass.

    Values of new nodes are computed on fake tensors as they are inserted, so shapes and dtypes (symbolic ones too) are
    always known, and a wrong shape fails at the line that causes it.
    """

    def __init__(self, program: Program, step: Step):
        self.program = program
        self.step = step
        #: What the pass reports: titles and JSON values.
        self.facts: dict[str, Any] = {}
        self._inserted: dict[str, Inserted] = {}
        self._owned: dict[tuple[str, str], str] = {}
        self._place: fx.Node | None = None
        self._meta: dict[str, Any] = {}
        self._fresh: set[fx.Node] = set()
        vals = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)]
        self._fake: FakeTensorMode = detect_fake_mode(vals) or FakeTensorMode(allow_non_fake_inputs=True)
        self.values = FakeValues(self._fake, program)
        self._tensors = TensorIndex(program.root, program.graph)

    @property
    def inserted(self) -> tuple[Inserted, ...]:
        """What was inserted so far, one entry for each module."""
        return tuple(self._inserted.values())

    # ---- tensors

    def parameter(
        self,
        site: Site,
        short: str,
        shape: tuple[int, ...],
        init: Callable[[Tensor], object] | None = None,
        role: str = "adapter",
        owner: str | None = None,
        of_weight: Callable[[Tensor], Tensor] | None = None,
    ) -> fx.Node:
        """A parameter of ``site``'s module, made and initialised on first use.

        Two uses of one module (a block shared by all layers) get one parameter. Dtype is fp32, or wider if the weight
        is: adapters train in fp32 whatever the base.

        Args:
            short: name below the module, e.g. ``lora_A.weight``
            shape: its shape
            init: fills the new tensor in place; it is zero without
            role: one of :data:`lorafx.graph.program.ROLES`; a ``statistic`` does not train
            of_weight: makes the new tensor, instead of ``init``, of the weight as a matrix (out, in) in that dtype (a
                stack as it is stored); without weights it waits until the run is opened with them
            owner: the path to keep it under instead of the module's; all sites that name one owner share its tensor,
                which is stored once
        """
        entry = self._entry(site)
        key = short.removesuffix(".weight")
        if owner is not None and (owner, key) in self._owned:
            entry.tensors[key] = self._owned[owner, key]
        if key not in entry.tensors:
            base = self.program.tensor(site.parameter)
            value = initial_value(site, base, shape, init, of_weight)
            name = self._unique(below(self.program.root, owner or site.module, short))
            self._tensors.put(name, nn.Parameter(value, requires_grad=role != "statistic"))
            self.program.roles[name] = role
            entry.tensors[key] = self._owned[owner or site.module, key] = name
        return self.tensor(entry.tensors[key])

    def earlier(self, site: Site, *shorts: str) -> Step | None:
        """The pass that inserted tensors of these short names at ``site`` before; from now on they are this one's too.

        None when no pass did.
        """
        for applied in reversed(self.program.history):
            for entry in applied.inserted:
                if entry.module == site.module and set(shorts) <= set(entry.tensors):
                    self._entry(site).tensors.update({short: entry.tensors[short] for short in shorts})
                    return applied.step
        return None

    def statistic(self, short: str, value: Tensor, site: Site | None = None) -> str:
        """A buffer that training keeps: one of ``site``'s module, or of the pass as a whole. Returns its name.

        Saved, resumed, and the same in every process of a data-parallel group.
        """
        entry = self._entry(site)
        if short not in entry.tensors:
            owner = site.module if site is not None else self.step.pass_name().replace("-", "_")
            name = self._unique(below(self.program.root, owner, short))
            device = self.program.device
            # Known even where the weights are not, as adapters are.
            self._tensors.put(name, value if device.type == "meta" else value.to(device))
            self.program.roles[name] = "statistic"
            entry.tensors[short] = name
        return entry.tensors[short]

    def names(self, site: Site) -> dict[str, str]:
        """The tensors this pass has at ``site``, by short name."""
        return self._entry(site).tensors

    def _entry(self, site: Site | None) -> Inserted:
        module, block, many = (site.module, site.block, site.matrices) if site is not None else ("", None, 1)
        return self._inserted.setdefault(module, Inserted(module, block, {}, many))

    def tensor(self, name: str) -> fx.Node:
        """The node that reads the tensor ``name``; one a graph, at its top."""
        for node in self._tensors.nodes(name):
            return node
        node = self._tensors.read(name)
        node.meta["val"] = self._fake_like(get_tensor(self.program.root, name))
        return node

    def set_tensor(self, name: str, value: Tensor, role: str | None = None) -> None:
        """Give ``name`` a new value of any shape; the old tensor object is left alone, other programs may share it."""
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)
        self._tensors.put(name, parameter)
        self.program.roles[name] = role or self.program.roles.get(name, "base")
        for node in self._tensors.nodes(name):
            node.meta["val"] = self._fake_like(parameter)

    def add_tensor(self, name: str, value: Tensor, role: str) -> str:
        """Store a frozen tensor under a name not yet taken, ``name`` if possible. Returns the name."""
        free = self._unique(name)
        self.set_tensor(free, value, role)
        return free

    def constant(self, name: str, value: Tensor) -> str:
        """Store a buffer that was not learned (indices, say) under a name not yet taken. Returns the name."""
        free = self._unique(name)
        self._tensors.put(free, value.to(self.program.device))
        self.program.roles[free] = "constant"
        return free

    def readers(self, name: str) -> list[fx.Node]:
        """The nodes that read the tensor ``name`` (under this name, when it has several)."""
        return [user for node in self._tensors.nodes(name) for user in node.users]

    def aliases(self, name: str) -> list[str]:
        """All names of the tensor called ``name``, itself included (more than one when it is tied)."""
        return self._tensors.names(name)

    def rename(self, old: str, new: str) -> None:
        """Give the tensor ``old`` the name ``new``; what had that name loses it."""
        self.set_tensor(new, get_tensor(self.program.root, old), self.program.roles[old])
        self._tensors.move(old, new)
        self.drop_tensor(old)

    def drop_tensor(self, name: str) -> None:
        """Forget a tensor whose value no operator uses."""
        self.sweep(self._tensors.nodes(name))
        self._tensors.drop(name)
        self.program.roles.pop(name, None)

    def train(self, modules: tuple[str, ...]) -> list[str]:
        """Make every floating parameter below ``modules`` trainable, with storage of its own. Returns their names."""
        # A tied tensor trains under whichever of its names lies below one of the modules.
        below = {
            id(value): name
            for name, value in named_tensors(self.program.root)
            if isinstance(value, nn.Parameter)
            and value.is_floating_point()
            and any(name == m or name.startswith(m + ".") for m in modules)
        }
        for name in below.values():
            self.train_tensor(name)
        return list(below.values())

    def train_tensor(self, name: str) -> None:
        """Make one parameter trainable, with storage of its own."""
        value = get_tensor(self.program.root, name)
        (value if value.is_meta else self._tensors.own(name)).requires_grad_(True)

    def freeze(self) -> None:
        """Stop the base from training."""
        for name, value in self.program.root.named_parameters():
            if self.program.roles.get(name) in ("base", "unread", "head"):
                value.requires_grad_(False)

    def _unique(self, name: str) -> str:
        stem, dot, leaf = name.rpartition(".weight")
        base, suffix = (stem, ".weight") if dot and not leaf else (name, "")
        candidate, count = name, 2
        while has_tensor(self.program.root, candidate):
            candidate, count = f"{base}_{count}{suffix}", count + 1
        return candidate

    # ---- nodes

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert what follows right after ``node``, in order, as part of the module that ran it."""
        with self._at(node.next, node):
            yield

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert what follows right before ``node``, in order, as part of the module that runs it."""
        with self._at(node, node):
            yield

    @contextmanager
    def _at(self, place: fx.Node, module: fx.Node) -> Iterator[None]:
        previous = self._place, self._meta
        self._place, self._meta = place, self._provenance(module)
        try:
            yield
        finally:
            self._place, self._meta = previous

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of the ATen operator ``op``; its fake value is computed at once."""
        assert self._place is not None, "call() needs a place: use it inside `with edit.after(node)`"
        with self.program.graph.inserting_before(self._place):
            node = self.program.graph.call_function(op, args, kwargs)
        node.meta.update(self._meta)
        node.meta["val"] = self.evaluate(node)
        self._fresh.add(node)
        return node

    def noise(self, kind: Literal["normal", "uniform"], like: fx.Node) -> fx.Node:
        """Noise of ``like``'s shape, N(0, 1) or U(0, 1), drawn afresh in each training forward.

        Evaluation takes its median (0 or ½), and recomputed activations see the same draw.
        """
        return self.call(aten.randn_like.default if kind == "normal" else aten.rand_like.default, like)

    def accumulate(self, name: str, value: fx.Node) -> None:
        """Add ``value`` to the statistic ``name`` in every training forward.

        Done at the end of the graph, outside all blocks: recomputing a block's activations must not count twice.
        """
        total = self.tensor(name)
        with self.program.graph.inserting_before(self.program.graph.output_node()):
            detached = self.program.graph.call_function(aten.detach.default, (value,))
            added = self.program.graph.call_function(aten.add_.Tensor, (total, detached))
        for node in (detached, added):
            node.meta.update(nn_module_stack={}, val=value.meta["val"], **{INSERTED_BY: self.step.pass_name()})

    # ---- around a weight

    def output(self, site: Site) -> fx.Node:
        """The node of ``site``'s result with all that earlier passes added to it."""
        node = site.node
        while True:
            following = [user for user in node.users if user.target is aten.add.Tensor and user.args[0] is node]
            added = [user for user in following if user.meta.get(INSERTED_FOR) == site.module]
            if not added:
                return node
            node = added[0]

    def replace_input(self, site: Site, new: fx.Node) -> None:
        """Let ``site``'s weight, and what earlier passes put beside it, read ``new`` instead of its input."""
        old = site.input
        for user in list(old.users):
            if user is site.node or (user not in self._fresh and user.meta.get(INSERTED_FOR) == site.module):
                user.replace_input_with(old, new)
        self._fresh = set()

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``; ``node`` itself when it has it already."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, dtype)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new``, except the nodes inserted since the last replacement."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self._fresh)
        self._fresh = set()

    def feed(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let ``reader`` alone read ``new`` where it read ``old``."""
        reader.replace_input_with(old, new)
        self._fresh = set()

    def sweep(self, nodes: Iterable[fx.Node]) -> None:
        """Erase those of ``nodes`` that are no longer used, and what was computed for them alone."""
        stack, gone = list(nodes), set()
        while stack:
            node = stack.pop()
            if node in gone or node.users or node.op in ("placeholder", "output") or has_effect(node):
                continue
            stack.extend(node.all_input_nodes)
            self.program.graph.erase_node(node)
            gone.add(node)

    def recompute(self) -> None:
        """Recompute the fake values of all operators after tensors changed their shapes.

        Raises:
            OperatorError: an operator does not accept its operands any more
        """
        for node in self.program.graph.nodes:
            if node.op != "call_function":
                continue
            try:
                node.meta["val"] = self.evaluate(node)
            except Exception as error:
                raise OperatorError(node.name, f"{node.target}: {error}") from error

    def evaluate(self, node: fx.Node) -> Any:
        """The node's value on fake tensors."""
        return self.values.of(node)

    def _fake_like(self, value: Tensor) -> Tensor:
        # Everything is on the device of the captured graph (meta, when captured without weights), so that operators
        # on fake tensors never see two devices.
        node = next(iter(self.program.graph.find_nodes(op="placeholder")))
        device = node.meta["val"].device
        with self._fake:
            fake = torch.empty(value.shape, dtype=value.dtype, device=device)
        return fake.requires_grad_(value.requires_grad) if value.is_floating_point() else fake

    def _provenance(self, node: fx.Node) -> dict[str, Any]:
        kept = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
        weight = node.meta.get(INSERTED_FOR) or self._weights.get(node)
        return {**kept, INSERTED_BY: self.step.pass_name(), **({INSERTED_FOR: weight} if weight else {})}

    @cached_property
    def _weights(self) -> dict[fx.Node, str]:
        """The names of the weights that the operators use."""
        return {s.reader or s.node: s.module for s in self.program.sites() if s.node.target in WEIGHT_OPS or s.reader}
