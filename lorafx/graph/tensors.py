"""An index of the tensors of a program by name and by identity, with the nodes that read them.

A graph has no such index: without one, every question about a tensor walks all nodes, and folding takes time quadratic
in the number of layers.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, fx, nn

from .tree import drop_tensor, get_tensor, has_tensor, named_tensors, put_tensor


class TensorIndex:
    """The tensors under ``root`` and the nodes of ``graph`` that read them; right as long as every change to either
    goes through it. Nodes may also be erased directly."""

    def __init__(self, root: nn.Module, graph: fx.Graph):
        self.root = root
        self.graph = graph

    @cached_property
    def _nodes(self) -> dict[str, dict[fx.Node, None]]:
        found: dict[str, dict[fx.Node, None]] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            found.setdefault(str(node.target), {})[node] = None
        return found

    @cached_property
    def _names(self) -> dict[int, dict[str, None]]:
        found: dict[int, dict[str, None]] = {}
        for name, value in named_tensors(self.root):
            found.setdefault(id(value), {})[name] = None
        return found

    def nodes(self, name: str) -> list[fx.Node]:
        """The nodes that give the tensor's value under this name."""
        known = self._nodes.get(name, {})
        for node in [node for node in known if node._erased]:
            del known[node]
        return list(known)

    def read(self, name: str) -> fx.Node:
        """A new node that gives the tensor's value, at the top of the graph."""
        nodes = self._nodes
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        nodes.setdefault(name, {})[node] = None
        return node

    def names(self, name: str) -> list[str]:
        """All names of the tensor called ``name``, itself included (more than one when it is tied)."""
        return list(self._names[id(get_tensor(self.root, name))])

    def put(self, name: str, value: Tensor) -> None:
        """Let ``name`` be ``value`` from now on; other names of what it was stay."""
        self._forget(name)
        put_tensor(self.root, name, value)
        self._names.setdefault(id(value), {})[name] = None

    def drop(self, name: str) -> None:
        """Forget the name; KeyError when there is no such tensor."""
        self._forget(name)
        drop_tensor(self.root, name)

    def move(self, old: str, new: str) -> None:
        """Let every node that reads ``old`` read ``new``."""
        for node in self.nodes(old):
            node.target = new
            self._nodes.setdefault(new, {})[node] = None
        self._nodes.pop(old, None)

    def own(self, name: str) -> nn.Parameter:
        """Give the parameter, under all of its names, storage of its own."""
        old = get_tensor(self.root, name)
        fresh = nn.Parameter(old.detach().clone(), old.requires_grad)
        for alias in self.names(name):
            self.put(alias, fresh)
        return fresh

    def _forget(self, name: str) -> None:
        if has_tensor(self.root, name):
            held = self._names[id(get_tensor(self.root, name))]
            del held[name]
            if not held:  # the next tensor may get this one's place in memory
                del self._names[id(get_tensor(self.root, name))]
