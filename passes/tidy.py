"""Drop what nothing reads any more, and keep the config true to the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..base import Pass, Promise
from ..graph.edit import Edit
from ..graph.program import Program
from ..graph.selection import Selection
from ..graph.tree import named_tensors


@dataclass(frozen=True)
class Tidy(Pass):
    """Drop what nothing reads any more, and keep the config true to the tensors.

    Before: dead operators, adapters that were merged, a tied output layer that got weights of its own
    After: none of these; ``tie_word_embeddings = False`` noted for the config where a tie had to be broken

    Tensors that no operator read at capture stay: they belong to the checkpoint's format.

    Keeps: the outputs, bit by bit. Does nothing to a tidy program.
    Source: dead-code elimination, as in any compiler.
    """

    promise: ClassVar[Promise] = Promise.EXACT

    def sites(self, program: Program) -> Selection[str]:
        read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and node.users}
        held = dict(named_tensors(program.root))
        alive = {id(held[name]) for name in read if name in held}
        dead = [name for name, value in held.items() if id(value) not in alive and program.roles.get(name) != "unread"]
        return Selection(tuple(name for name in dead if name in program.roles))

    def rewrite(self, edit: Edit, site: str) -> None:
        edit.drop_tensor(site)

    def finish(self, edit: Edit) -> None:
        edit.program.graph.eliminate_dead_code()
        model, config = edit.program.source.model, edit.program.config
        if not getattr(config, "tie_word_embeddings", False):
            return
        output = edit.program.output_layer
        names = [name for name, value in named_tensors(model) if output is not None and value is output.weight]
        if len({id(edit.program.tensor(name)) for name in names}) > 1:
            edit.program.config_changes["tie_word_embeddings"] = False
