"""Compare a folded program with the one it was folded from, block by block, with the tensors of one block in memory.

Each block of the folded program gets the unfolded one's inputs, so that the block itself is compared, without the
rounding of all blocks before it. A wrong block cannot hide behind those that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..deferred.running import alike, handed_on
from ..graph.evaluation import own_evaluation_form
from ..graph.precision import coarsest, tolerance
from ..graph.program import Program
from ..parity.comparison import Case, Comparison, difference


@dataclass(frozen=True)
class BlockProof:
    """What was compared: the values that pass from one block to another, and the outputs.

    Attributes:
        comparison: a case for each of these
        blocks: how many blocks gave at least one of them
        missed: blocks that gave none, because folding left none of their values under its name
    """

    comparison: Comparison
    blocks: int
    missed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every block gave something to compare, and everything agrees."""
        return not self.missed and self.comparison.ok

    def __str__(self) -> str:
        return f"{self.blocks} blocks, each on the inputs it has in the program: {self.comparison.summary}"


def prove_blocks(reference: Program, folded: Program, inputs: Mapping[str, Any], label: str) -> BlockProof:
    """Compare the blocks of ``folded`` with those of ``reference``, from the embeddings to the outputs.

    Args:
        inputs: what both are called with
        label: the name of ``folded`` in the comparison
    """
    first, second = own_evaluation_form(reference), own_evaluation_form(folded)
    expected, _ = handed_on(first, inputs)
    # The unfolded program's own values, wherever it has them under that name.
    given, places = handed_on(second, inputs, expected)
    shared = [name for name, value in given.items() if alike(value, expected.get(name))]
    lowest = coarsest(value.dtype for value in second.root.parameters())
    cases = [_case(places[name], name, expected[name], given[name]) for name in shared]
    reached = {places[name] for name in shared if places[name]}
    missed = tuple(dict.fromkeys(block for block in places.values() if block and block not in reached))
    ends = [name for name in _outputs(second.graph) if name not in shared]
    problems = tuple(f"the output {name} could not be compared" for name in ends)
    comparison = Comparison(f"{reference.name} program", label, lowest, tolerance(lowest), tuple(cases), problems)
    return BlockProof(comparison, len(reached), missed)


def _case(block: str, name: str, expected: Tensor, found: Tensor) -> Case:
    return difference("the example inputs", f"{block or 'outside blocks'}: {name}", expected, found, same_nan=True)


def _outputs(graph: fx.Graph) -> Iterator[str]:
    """The nodes whose values are the program's outputs."""
    for node in graph.output_node().all_input_nodes:
        if node.op == "call_function":
            yield node.name
