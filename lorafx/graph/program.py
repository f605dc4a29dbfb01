"""A program: one captured model as a graph over named tensors, with what is known about them and how it came to be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..models.tasks import output_layer
from .domain import Domain
from .site import Site, find_sites
from .tree import copy_tree, get_tensor, has_tensor, named_tensors, tensor_hash

if TYPE_CHECKING:
    from .selection import Miss

#: What a tensor is for. Recorded when it appears, never guessed from its name.
ROLES = ("base", "head", "unread", "constant", "adapter", "gate", "statistic")


@dataclass(frozen=True)
class Source:
    """Where the base came from: the eager model (its code and its tensors) and, if it was a folder, what was in it.

    Attributes:
        model: the eager module that was captured, sharing its tensors with the program
        path: the checkpoint folder, or None for a model handed over in memory
        task: the task asked for, or None
        options: further keyword arguments that open the same model again (``num_labels``, ``dtype``, …)
        hashes: sha256 of every weight file of the folder, by file name; of its header alone if it was not read (see
            :func:`lorafx.models.identity.weight_hashes`)
        fresh: names of parameters the checkpoint did not hold, so that they were newly initialised
        drawn: sha256 of the values these got, where they got any: what is still the same was never trained
        adapters: names of the tensors of another library's adapters, if the model was captured with some inside; their
            roles are those of any tensor that the model came with
        added: the adapters that were put on it: where each was, its weight, and the sha256 of its files
        modified: weight files that are newer or older than when the run was rewritten, which read none of them: whether
            they hold what they held then cannot be told
    """

    model: nn.Module
    path: str | None = None
    task: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    drawn: Mapping[str, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    added: tuple[Mapping[str, Any], ...] = ()
    modified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signature:
    """How the graph is called: input names in order, the pytree specs of its arguments and of its result, and which
    inputs it is right for.

    ``proven`` remembers what the model was found to compute without some of its inputs (:mod:`lorafx.models.eager`).
    """

    inputs: tuple[str, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    domain: Domain
    proven: dict[Any, dict[str, str] | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dynamic_shapes(self) -> dict[str, str]:
        """The free sizes and their ranges, by the first input and axis each is; empty when every size is fixed."""
        return {self.domain.readable(name): str(allowed) for name, allowed in self.domain.ranges.items()}


class Step(Protocol):
    """What a history knows about a pass: a :class:`lorafx.base.Pass`, which is defined above this folder."""

    #: A :class:`lorafx.base.Promise`.
    promise: ClassVar[Any]

    @classmethod
    def pass_name(cls) -> str:
        """Its name in recipes."""
        ...


@dataclass(frozen=True)
class Inserted:
    """What a pass put at one site: tensor names by their short names (``{"lora_A": "….lora_A.weight"}``).

    ``matrices`` says how many the site's weight is a stack of.
    """

    module: str
    block: int | None
    tensors: dict[str, str]
    matrices: int = 1


@dataclass(frozen=True)
class Applied:
    """One entry of a program's history: a pass, what it inserted where, what it missed, and the time it took (s).

    ``facts`` are what it reports: titles and JSON values. ``proof`` says how the pass was checked against its promise,
    or why it was not; ``difference`` is the largest that was found, as a share of the outputs' scale.
    """

    step: Step
    inserted: tuple[Inserted, ...] = ()
    taken: tuple[str, ...] = ()
    missed: tuple[Miss[Any], ...] = ()
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    proof: str = ""
    difference: float | None = None


@dataclass
class Program:
    """One captured model, as data. Rewrites return a new one; tensors share storage until one of them trains.

    :class:`lorafx.Program` is the public subclass.

    Attributes:
        graph: ATen operators; reads its tensors by name from ``root``
        root: a bare module tree that stores the tensors under the names of the original model
        roles: what each tensor is for (see :data:`ROLES`)
        signature: input names and pytree specs
        example: inputs it was captured with (batch 2, one padded row)
        source: the eager model and its folder
        heads: module paths of the task head (everything outside the base model)
        stage: ``"train"`` (dropout and noise live) or ``"eval"``
        history: the passes applied, oldest first
        origin: the program this one was folded from, or None
        captured: the program before any pass, or None when it was not kept
        untrainable: why it cannot train, if so; it is in evaluation form then
        trained: what its last training gave, as JSON values; None when it was not trained, or when what a pass did
            since is another function
        earlier: what is kept of the trainings before that, oldest first
        config_changes: what the config has to say otherwise, e.g. of an output layer that is no longer tied
    """

    graph: fx.Graph
    root: nn.Module
    roles: dict[str, str]
    signature: Signature
    example: dict[str, Any]
    source: Source
    heads: tuple[str, ...] = ()
    stage: str = "train"
    history: tuple[Applied, ...] = ()
    origin: Self | None = None
    captured: Self | None = None
    untrainable: str = ""
    trained: Mapping[str, Any] | None = None
    earlier: tuple[Mapping[str, Any], ...] = ()
    config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the base model, or None for a plain module."""
        return getattr(self.source.model, "config", None)

    @property
    def name(self) -> str:
        """The class name of the captured model."""
        return type(self.source.model).__name__

    @property
    def device(self) -> torch.device:
        """Where the tensors are; ``meta`` when captured without weights."""
        tensors = itertools.chain(self.root.parameters(), self.root.buffers())
        return next((value.device for value in tensors), torch.device("cpu"))

    @property
    def output_layer(self) -> nn.Module | None:
        """The eager model's layer of logits over its vocabulary; None where there is none."""
        return output_layer(self.source.model)

    def sites(self) -> list[Site]:
        """Every use of every weight, in graph order."""
        return find_sites(self.graph, self.root, self.in_head)

    def in_head(self, module: str) -> bool:
        """Whether a module path lies in the task head or the output layer."""
        return any(module == head or module.startswith(head + ".") for head in self.heads)

    def default_trainable(self) -> tuple[str, ...]:
        """Modules that train in full unless told otherwise: a classification head, as in PEFT; never an LM head."""
        return () if self.output_layer is not None else self.heads

    def modules_named(self, name: str) -> tuple[str, ...]:
        """Paths of the modules that ``name`` names as in PEFT: the path itself or a dotted suffix of it."""
        paths = [path for path, _ in self.root.named_modules()]
        return tuple(path for path in paths if path == name or path.endswith("." + name))

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer called ``name``."""
        return get_tensor(self.root, name)

    def names(self, *roles: str) -> list[str]:
        """The names of the tensors that have one of ``roles``."""
        return [name for name, role in self.roles.items() if role in roles]

    def facts(self, title: str) -> list[Any]:
        """The rows that passes have for the report under ``title``, oldest first."""
        return [row for applied in self.history for row in applied.facts.get(title, ())]

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, aliases of a tied one left out."""
        return {name: value for name, value in self.root.named_parameters() if value.requires_grad}

    def learned(self) -> dict[str, Tensor]:
        """Every tensor the base checkpoint does not hold: inserted, trained or newly initialised ones. Aliases once."""
        inserted = {*self.names("adapter", "gate", "statistic"), *updated(self.graph)}
        result, seen = {}, set()
        for name, value in named_tensors(self.root):
            wanted = name in inserted or name in self.source.fresh or value.requires_grad
            if wanted and id(value) not in seen:
                seen.add(id(value))
                result[name] = value.detach()
        return result

    def untrained(self) -> list[str]:
        """Names of the tensors that are as they were drawn at random: no file holds them, and nothing trained them."""
        drawn = {name: digest for name, digest in self.source.drawn.items() if has_tensor(self.root, name)}
        return sorted(name for name, digest in drawn.items() if tensor_hash(self.tensor(name)) == digest)

    def waiting(self) -> list[str]:
        """The inserted tensors whose values are made of weights that the program does not have yet."""
        return [name for name in self.names("adapter", "gate", "statistic") if self.tensor(name).is_meta]

    def __repr__(self) -> str:
        steps = ", ".join(applied.step.pass_name() for applied in self.history) or "as captured"
        trained, all_of_them = (parameter_count(of) for of in (self.trainable().values(), self.root.parameters()))
        return f"<{type(self).__name__} {self.name}: {steps}; {trained:,} of {all_of_them:,} parameters train>"

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy ``values`` into the tensors of those names. KeyError: an unknown name; ValueError: a wrong shape."""
        for name, value in values.items():
            target = self.tensor(name)
            if target.shape != value.shape:
                raise ValueError(f"{name}: expected shape {tuple(target.shape)}, found {tuple(value.shape)}")
            with torch.no_grad():
                target.copy_(value)

    def outlive_training(self) -> None:
        """Move the last training's record to the earlier ones, since another begins or the function changed.

        Its figures, what they were measured on, and how it began are kept; curves of another function could be mistaken
        for those of this one.
        """
        if self.trained is not None:
            start = [entry for entry in self.trained.get("history") or () if entry.get("step") == 0]
            told = {key: value for key, value in self.trained.items() if key in _OUTLIVES}
            self.earlier += ({**told, "history": start},)
        self.trained = None

    def copy(self) -> Self:
        """The same program with a graph and tree of its own; tensors share storage, unless running updates them."""
        graph = fx.Graph()
        result = graph.graph_copy(self.graph, {})
        if result is not None:
            graph.output(result)
        return dataclasses.replace(
            self,
            graph=graph,
            root=copy_tree(self.root, updated(self.graph) | set(self.names("statistic"))),
            roles=dict(self.roles),
            config_changes=dict(self.config_changes),
        )


#: What is kept of a training when another follows.
_OUTLIVES = ("metrics", "seconds", "passes", "evaluated")
#: A kind of program: rewriting one gives the same kind.
P = TypeVar("P", bound=Program)

#: Operators that update running statistics although their schemas do not say so, and the argument that says whether.
_RUNNING = {torch.ops.aten.batch_norm.default: 5, torch.ops.aten.instance_norm.default: 5}


def updated(graph: fx.Graph) -> set[str]:
    """Names of the tensors that running the graph changes: counters, running statistics, embeddings kept short."""
    written: list[Any] = []
    for node in graph.nodes:
        if node.target in _RUNNING:
            written += node.args[3:5] if node.args[_RUNNING[node.target]] else ()
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
            given.update(node.kwargs)
            writes = [a.name for a in node.target._schema.arguments if a.alias_info and a.alias_info.is_write]
            written += [given.get(name) for name in writes]
    owners = [_owner(node) for node in written if isinstance(node, fx.Node)]
    return {str(node.target) for node in owners if node.op == "get_attr"}


def _owner(node: fx.Node) -> fx.Node:
    """The value whose memory ``node`` is a view of."""
    while isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
        first = node.args[0] if node.args else None
        if node.target._schema.returns[0].alias_info is None or not isinstance(first, fx.Node):
            break
        node = first
    return node


def structure(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Operators and the shapes of tensors: equal for graphs that differ in their tensors' values only."""
    operators = [node for node in graph.nodes if node.op != "get_attr"]
    number = {node: f"%{index}" for index, node in enumerate(operators)}

    def name(node: fx.Node) -> str:
        return number.get(node) or f"{node.target}{getattr(node.meta.get('val'), 'shape', '')}"

    return [(n.op, str(n.target), str(fx.map_arg((n.args, n.kwargs), name))) for n in operators]


def parameter_count(values: Iterable[Tensor]) -> int:
    """How many numbers the tensors hold."""
    return sum(value.numel() for value in values)
