"""Which affine regions are worth folding: those after which the program reads fewer learned numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from ..base import Method
from ..graph.constants import Constants
from ..graph.operands import is_mutable
from ..graph.program import Program
from ..graph.site import WEIGHT_OPS, is_tensor_node
from ..graph.tree import has_tensor
from .regions import AffineAnalysis, Region
from .rules import CASTS, RULES, carrier_features, groups_of

LEARNED = ("adapter", "gate", "statistic")


@dataclass(frozen=True)
class Group:
    """The regions whose carriers use the same weight. They fold together, so that a shared weight stays shared where
    possible."""

    weight: str
    regions: tuple[Region, ...]

    def __str__(self) -> str:
        reads = {name for region in self.regions for name in region.reads} - {self.weight}
        return f"{self.weight}: {', '.join(sorted(reads))}"


def worth_folding(program: Program) -> list[Group]:
    """The groups of regions to fold, none overlapping. Of nested regions the one that frees most is taken, of equals
    one that leaves its carrier's bias without other readers, of these the smallest: everything learned is rounded once,
    no bias is written twice, and operators of the base model stay outside."""
    analysis = AffineAnalysis(program.root, RULES)
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    writes = [place[node] for node in program.graph.nodes if is_mutable(node)]
    candidates = [
        region
        for node in program.graph.nodes
        for region in analysis.regions(node)
        if _can_take_over(region) and _undisturbed(region, place, writes)
    ]
    account = _accounting(program, candidates)

    def rank(region: Region) -> tuple[int, ...]:
        freed, read, alone = account(region)
        return -freed, not alone, -read, len(region.nodes), place[region.root]

    taken: list[Region] = []
    used: set[fx.Node] = set()
    for region in sorted((region for region in candidates if account(region)[1] > 0), key=rank):
        if not region.nodes & used:
            used |= region.nodes
            taken.append(region)
    return _groups(program, sorted(taken, key=lambda region: place[region.root]))


def added(program: Program) -> frozenset[str]:
    """Names of the tensors that were put into the base model: by passes, or by another library before the capture."""
    return program.source.adapters.union(program.names(*LEARNED))


def weight_of(carrier: fx.Node) -> fx.Node:
    """The node that reads the carrier's weight."""
    weight = carrier.args[WEIGHT_OPS[carrier.target].weight]
    assert isinstance(weight, fx.Node)
    return weight


def bias_of(carrier: fx.Node) -> fx.Node | None:
    """The node of the carrier's bias, or None. It may be computed, as a part of a tensor, say."""
    use = WEIGHT_OPS[carrier.target]
    bias = carrier.args[use.bias] if use.bias is not None and len(carrier.args) > use.bias else None
    return bias if isinstance(bias, fx.Node) else None


def _accounting(program: Program, candidates: list[Region]) -> Callable[[Region], tuple[int, int, bool]]:
    """How many numbers a region reads beyond its carrier's own weight and bias: those that nothing else reads but the
    regions alike (other uses of a shared module), and all; and whether nothing else reads that bias.

    Where it is known what was put into the base model, all of that must be so: the base keeps its architecture. Of a
    captured model, constants that its tracer lifted may be either's; they give no reason to fold. In any other program
    anything may have been learned, but one-dimensional parameters (norms, layer scales) count as the base's and give
    no reason to fold either.
    """
    methods = any(isinstance(applied.step, Method) for applied in program.history)
    known = methods or bool(program.source.adapters)
    learned = added(program)
    lifted = set() if methods else set(program.names("constant"))

    constants = Constants(program.root)
    found = _consumers(program.graph, constants, set())
    consumers = {str(node.target): users for node, users in found.items() if node.op == "get_attr"}

    alike: dict[object, set[fx.Node]] = defaultdict(set)
    for region in candidates:
        alike[region.key] |= region.nodes

    def account(region: Region) -> tuple[int, int, bool]:
        carrier = region.carrier
        assert carrier is not None
        bias = bias_of(carrier)
        own = constants.reads(bias) if bias is not None else None
        extra = region.reads - {str(weight_of(carrier).target)} - (own or frozenset())
        if known and extra - learned - lifted:
            return 0, 0, False
        reasons = extra & learned if known else {name for name in extra if program.tensor(name).dim() > 1}
        sizes = {name: program.tensor(name).numel() for name in reasons}
        freed = sum(size for name, size in sizes.items() if consumers[name] <= alike[region.key])
        new = carrier_features(carrier) if region.shifts and not is_tensor_node(bias) else 0
        alone = all(consumers[name] <= alike[region.key] for name in own or ())
        return freed, sum(sizes.values()) - new, alone

    return account


def _can_take_over(region: Region) -> bool:
    """Closed (inner values are read inside only, but for casts of the origin), and led by a carrier of the map's size
    and dtype, which can read the origin. Folding removes at least one operator, so repeated folding ends."""
    carrier, root = region.carrier, region.root
    if carrier is None or not region.bypass or root.meta["val"].dtype != carrier.meta["val"].dtype:
        return False
    if (region.shifts and WEIGHT_OPS[carrier.target].bias is None) or region.groups % groups_of(carrier):
        return False

    def width(node: fx.Node) -> object:
        return node.meta["val"].shape[region.axis]

    kept = dict(region.identities())
    spans = width(root) == carrier_features(carrier) and all(width(node) == width(k) for node, k in kept.items())
    inner = [node for node in region.nodes if node is not root and not _is_cast_of(node, region.origin.node)]
    return spans and _keeps_dtypes(kept, root) and all(user in region.nodes for node in inner for user in node.users)


def _is_cast_of(node: fx.Node, origin: fx.Node) -> bool:
    while node.target in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is origin


def _keeps_dtypes(kept: Mapping[fx.Node, fx.Node], root: fx.Node) -> bool:
    """Whether readers of an operator that becomes an identity find the dtype it had, or cast it anyway."""
    return all(
        node.meta["val"].dtype == value.meta["val"].dtype
        or (node is not root and all(user.target in CASTS for user in node.users))
        for node, value in kept.items()
    )


def _undisturbed(region: Region, place: dict[fx.Node, int], writes: list[int]) -> bool:
    """Whether nothing is written in place while the region is computed: once folded, all of it is computed at one
    place."""
    first = min(place[node] for node in region.nodes)
    return not any(first < index < place[region.root] for index in writes)


def _groups(program: Program, regions: list[Region]) -> list[Group]:
    """Regions by weight, without those after which everything they read would still be read by others."""
    constants = Constants(program.root)
    # A name without a tensor stands for an inner graph.
    nodes = [n for n in program.graph.find_nodes(op="get_attr") if has_tensor(program.root, str(n.target))]
    while True:
        used = {node for region in regions for node in region.nodes}
        consumers = _consumers(program.graph, constants, used)
        # What the graph writes into is not a constant, and is not freed.
        read = {str(n.target) for n in nodes if n not in consumers or consumers[n] - used}
        free = {str(n.target) for n in nodes} - read
        groups: dict[str, list[Region]] = defaultdict(list)
        for region in regions:
            assert region.carrier is not None
            groups[str(weight_of(region.carrier).target)].append(region)
        kept = {w: found for w, found in groups.items() if any((r.reads - {w}) & free for r in found)}
        if len(kept) == len(groups):
            return [Group(weight, tuple(found)) for weight, found in groups.items()]
        regions = [region for found in kept.values() for region in found]


def _consumers(graph: fx.Graph, constants: Constants, used: set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """The operators that use a constant's value, seen through operators on tensors alone (a transposed view, say)."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for node in reversed(graph.nodes):
        if constants.reads(node) is not None:
            last = {user for user in node.users if user in used or constants.reads(user) is None}
            found[node] = last.union(*(found[user] for user in node.users if user not in last))
    return found
