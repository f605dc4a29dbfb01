"""A site: one use of one weight in the graph. Finding them knows operators, never architectures."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn

from ..models.roles import role_of
from .derived_roles import Projection, derived_roles
from .target import STACK
from .tree import get_tensor, named_tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightOp:
    """How one operator uses a weight: its place among the arguments, and how it is stored.

    As a matrix a weight is (out, in); a convolution's ``in`` is its patches. ``transposed`` says that it is stored as
    (in, out).
    """

    kind: str
    weight: int
    bias: int | None
    input: int
    transposed: bool = False

    def size(self, shape: torch.Size) -> tuple[int, int]:
        """(out, in) of a weight of this shape."""
        rest = shape[1:].numel()
        return (rest, shape[0]) if self.transposed else (shape[0], rest)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix (out, in); a view."""
        return weight.t() if self.transposed else weight.flatten(1)

    def stored(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """A matrix (out, in) as a weight of this shape."""
        return (matrix.t() if self.transposed else matrix).reshape(shape)


#: The operators whose weights are sites. Any other reader of a parameter of two or more dimensions is shown as a miss.
WEIGHT_OPS: dict[Any, WeightOp] = {
    aten.linear.default: WeightOp("linear", 1, 2, 0),
    aten.addmm.default: WeightOp("addmm", 2, 0, 1, transposed=True),
    aten.embedding.default: WeightOp("embedding", 0, None, 1, transposed=True),
    aten.conv1d.default: WeightOp("conv1d", 1, 2, 0),
    aten.conv2d.default: WeightOp("conv2d", 1, 2, 0),
    aten.conv3d.default: WeightOp("conv3d", 1, 2, 0),
}

#: The operators that use a stack matrix by matrix. By name: transformers registers its own operator when its experts
#: are first imported.
_STACK_OPS = frozenset(
    (
        *("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default", "aten.bmm.default"),
        *("aten.baddbmm.default", "aten.matmul.default", "aten.einsum.default", "aten.index.Tensor"),
        *("aten.index_select.default", "aten.select.int", "aten.unbind.int"),
    )
)


@dataclass(frozen=True)
class Site:
    """One use of one weight.

    Attributes:
        module: the weight's name for people: the path of the module that uses it, e.g.
            ``bert.encoder.layer.0.attention.self.query``; of several that one module uses, the path of the module that
            owns it (``self_attn.out_proj``) or its own name (``self_attn.q_proj_weight``)
        parameter: name of the weight
        kind: ``linear``, ``addmm`` (weight stored (in, out)), ``embedding``, ``conv1d/2d/3d``, ``stack`` (of matrices
            that are used one by one, those of a mixture's experts) or the operator's name
        out_features, in_features: the weight as a matrix (for a convolution, in × kernel; of a stack, each as stored)
        block: index of the block, read from the module path; None outside blocks
        role: what the weight does, e.g. ``attn.query``
        node: the operator's node in the program's graph
        blocks: how many blocks its stack has (an encoder's and a decoder's are two); 0 outside blocks
        names: its other names, where the module that uses it is not its owner or has several weights: that
            module's path, and the weight's own name
        matrices: how many a stack has
        stored, reader: of a stack, the node of the weight as it is stored, with what passes made of it, and the
            operator that takes it from there: the site's own, or one that shows the stack to it from another side
    """

    module: str
    parameter: str
    kind: str
    out_features: int
    in_features: int
    block: int | None
    role: str
    node: fx.Node = field(repr=False, compare=False)
    blocks: int = 0
    names: tuple[str, ...] = ()
    matrices: int = 1
    stored: fx.Node | None = field(default=None, repr=False, compare=False)
    reader: fx.Node | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        many = f"{self.matrices}x" if self.kind == STACK else ""
        return f"{self.module} ({self.kind} {many}{self.out_features}x{self.in_features}, {self.role})"

    @property
    def op(self) -> WeightOp:
        """How the site's operator uses its weight."""
        return WEIGHT_OPS[self.node.target]

    @property
    def input(self) -> fx.Node:
        """The node of the activation (token indices for an embedding)."""
        value = self.node.args[self.op.input]
        assert isinstance(value, fx.Node)
        return value

    @property
    def bias(self) -> fx.Node | None:
        """The node of the tensor that a weight operator adds; None where it has none, or adds what was computed."""
        use = WEIGHT_OPS.get(self.node.target)
        place = use.bias if use is not None else None
        value = self.node.args[place] if place is not None and len(self.node.args) > place else None
        return value if is_tensor_node(value) else None


def block_of(module: str) -> int | None:
    """The first number in a module path: ``encoder.layer.3.output`` is in block 3."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def stack_of(module: str) -> str:
    """The part before the first number in a module path: ``encoder.layer`` for ``encoder.layer.3.output``."""
    parts = module.split(".")
    return ".".join(itertools.takewhile(lambda part: not part.isdigit(), parts))


def module_path(node: fx.Node, fallback: str) -> str:
    """The path of the innermost module that ran ``node``, from the capture's metadata; else ``fallback``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths and paths[-1] else fallback


#: Where a node that a pass inserted keeps the name of the pass, and that of the weight it was inserted for.
INSERTED_BY = "lorafx_pass"
INSERTED_FOR = "lorafx_weight"


def is_tensor_node(value: object) -> TypeGuard[fx.Node]:
    """Whether a node's argument reads a parameter, buffer or constant."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _is_matrix(root: nn.Module, node: fx.Node) -> bool:
    try:
        value: Tensor = get_tensor(root, str(node.target))
    except KeyError:  # an inner graph, not a tensor
        return False
    return isinstance(value, nn.Parameter) and value.dim() >= 2


def find_sites(graph: fx.Graph, root: nn.Module, in_head: Callable[[str], bool]) -> list[Site]:
    """Every use of every parameter of two or more dimensions, in graph order.

    ``in_head`` says of a module's path whether it lies in the task head.
    """
    read: dict[fx.Node, list[_Use]] = defaultdict(list)
    for weight in graph.find_nodes(op="get_attr"):
        if _is_matrix(root, weight):
            for use in _uses(weight, weight):
                read[use.user].append(use)
    sites = [_site(root, in_head, use) for node in graph.nodes for use in read[node]]
    blocks: dict[str, int] = defaultdict(int)
    for site in sites:
        if site.block is not None:
            blocks[stack_of(site.module)] = max(blocks[stack_of(site.module)], site.block + 1)
    sites = [replace(site, blocks=blocks[stack_of(site.module)]) if site.block is not None else site for site in sites]
    return _in_their_roles(graph, _told_apart(root, sites))


#: Kinds of site whose role the graph can tell.
_PROJECTIONS = ("linear", "addmm")


def _in_their_roles(graph: fx.Graph, sites: list[Site]) -> list[Site]:
    """The sites, with roles from the graph for those inside blocks whose names give none; all uses have to agree."""
    own = [site for site in sites if site.kind in _PROJECTIONS and INSERTED_FOR not in site.node.meta]
    unnamed = [site for site in own if site.role == "other" and site.block is not None]
    if not unnamed:
        return sites
    projections = {
        site.node: Projection(
            site.input,
            site.out_features,
            site.in_features,
            None if site.block is None else (stack_of(site.module), site.block),
        )
        for site in own
    }
    roles = derived_roles(graph, projections, {site.node for site in sites if INSERTED_FOR in site.node.meta})
    told: dict[str, set[str]] = defaultdict(set)
    for site in unnamed:
        told[site.parameter].add(roles.get(site.node, "other"))
    agreed = {name: role for name, (role, *others) in told.items() if not others}
    nodes = {site.node for site in unnamed}
    return [replace(site, role=agreed.get(site.parameter, "other")) if site.node in nodes else site for site in sites]


def _told_apart(root: nn.Module, sites: list[Site]) -> list[Site]:
    """The sites with names: each weight of a module that uses several gets one that no other weight has."""
    own = _own_names(root, [site for site in sites if INSERTED_FOR not in site.node.meta])
    which = {site: id(get_tensor(root, site.parameter)) for site in own}
    called = {site: site.module for site in own}
    several = set(_rivals(called, which))
    # A weight that another module owns is named after that one, as in PEFT ...
    for site in several:
        owner, _, leaf = own[site].rpartition(".")
        called[site] = owner if leaf == "weight" and _within(owner, site.module) else site.module
    # (a stack always: PEFT names it so, and its module's other parameters are biases) ...
    called = {site: own[site] if site.kind == STACK else name for site, name in called.items()}
    called = {site: name for site, name in called.items() if site.node.target in WEIGHT_OPS or site.kind == STACK}
    # ... weights that would still share a name get the tensor's name ...
    for site in _rivals(called, which):
        called[site] = called[site] if own[site] == f"{called[site]}.weight" else own[site]
    # ... and a matrix used both ways round is two weights.
    for site in _rivals(called, {site: site.kind == "addmm" for site in called}):
        called[site] += "_transposed" if site.kind == "addmm" else ""
    # An ordinary layer answers to its path and to nothing else.
    other = several | {site for site, name in own.items() if name != f"{site.module}.weight"}
    return [_named(site, own[site], called.get(site, site.module)) if site in other else site for site in sites]


def _own_names(root: nn.Module, sites: list[Site]) -> dict[Site, str]:
    """The name of each site's tensor: of several that one inside the module that uses it."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, value in named_tensors(root):
        names[id(value)].append(name)
    found = {}
    for site in sites:
        aliases = names[id(get_tensor(root, site.parameter))]
        found[site] = next((name for name in aliases if _within(name, site.module)), site.parameter)
    return found


def _rivals(called: dict[Site, str], which: Mapping[Site, object]) -> list[Site]:
    """The sites whose name several of ``which`` share, or is empty."""
    users: dict[str, set[object]] = defaultdict(set)
    for site, name in called.items():
        users[name].add(which[site])
    return [site for site, name in called.items() if not name or len(users[name]) > 1]


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _named(site: Site, own: str, called: str) -> Site:
    names = [site.module, own]
    if _within(own, site.module):
        names.append(own.removesuffix(".weight"))
    # A stack has no role: as in PEFT, it is adapted where it is named itself.
    kept = site.role == "head" or called == site.module or site.kind == STACK
    role = site.role if kept else role_of(called, site.kind)
    return replace(site, module=called, role=role, names=tuple(n for n in dict.fromkeys(names) if n and n != called))


#: Operators that transpose a stack of weights; the use is what follows.
_SIDES = (aten.transpose.int, aten.permute.default)
#: Operators by which passes change a stack; the use is what reads the result.
_CHANGES = (aten.add.Tensor, aten.to.dtype)


class _Use(NamedTuple):
    """The node of a weight, its node where it is stored, the node that reads it there, and the node that uses it."""

    weight: fx.Node
    stored: fx.Node
    reader: fx.Node
    user: fx.Node


def _uses(weight: fx.Node, stored: fx.Node) -> Iterator[_Use]:
    stacked = weight.meta["val"].dim() > 2
    for reader in stored.users:
        if stacked and reader.target in _CHANGES and INSERTED_BY in reader.meta:
            yield from _uses(weight, reader)
        else:
            for user in reader.users if stacked and reader.target in _SIDES else (reader,):
                yield _Use(weight, stored, reader, user)


def _site(root: nn.Module, in_head: Callable[[str], bool], found: _Use) -> Site:
    node, name = found.user, str(found.weight.target)
    shape = get_tensor(root, name).shape
    use = WEIGHT_OPS.get(node.target)
    stacked = use is None and len(shape) == 3 and str(node.target) in _STACK_OPS
    if use is not None and len(node.args) > use.weight and node.args[use.weight] is found.weight:
        kind, (out_features, in_features) = use.kind, use.size(shape)
    elif stacked:
        kind, (out_features, in_features) = STACK, shape[1:]
    else:
        # As the input of a weight operator, a parameter is a table of activations.
        kind = _operator_name(node) if use is None else f"{use.kind}-input"
        out_features, in_features = shape[0], shape[1:].numel()
    owner = name.rpartition(".")[0]
    module = node.meta.get(INSERTED_FOR) or module_path(node, owner)
    # A weight used through an operator of its own module has that module's path; one read from outside (a tied
    # output layer, a fused operator) is named by the module that runs it.
    role = "head" if in_head(module) else role_of(module, kind)
    site = Site(module, name, kind, out_features, in_features, block_of(module), role, node)
    return replace(site, matrices=shape[0], stored=found.stored, reader=found.reader) if stacked else site


def _operator_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
