"""What is lost when a folded checkpoint is quantised again as its base was: the base's numbers survive that exactly,
folded ones do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import first_line
from ..graph.program import Program
from ..models.checkpoint import open_model, read_config
from ..models.quantized import Quantization


def requantised(program: Program, folder: Path) -> str | None:
    """How far quantising again by the base's own method moves the weights that folding changed, compared with how far
    folding moved them, as one line; None where the base of ``program`` is not quantised.

    Both as shares of the norm of these weights in ``folder``. Three models are in memory.
    """
    path = program.source.path
    found = Quantization.of(read_config(Path(path))) if path is not None else None
    if found is None:
        return None
    trusted = {"trust_remote_code": bool(program.source.options.get("trust_remote_code"))}
    start = f"quantised again as its base was ({found.method})"
    try:
        again = found.applied(type(program.source.model), folder, trusted)
    except Exception as error:  # each method has errors of its own: data to calibrate with, a device
        return f"{start}: not tried here, {first_line(error)}"
    plain, _ = open_model(folder, None, trusted)
    folded = {name: share for name, share in _moved(plain, program.source.model).items() if share}
    lost = {name: share for name, share in _moved(plain, again).items() if name in folded}
    if not any(lost.values()):
        return f"{start}: none of the {len(folded)} weights that folding changed moves"
    worst = max(lost, key=lambda name: lost[name])
    return (
        f"{start}: the {len(folded)} weights that folding changed move by {_whole(lost, plain):.3g} of their norm, at "
        f"most {lost[worst]:.3g} ({worst}); folding moved them by {_whole(folded, plain):.3g}"
    )


def _moved(plain: nn.Module, other: Any) -> dict[str, float]:
    """By how much of its norm each weight differs, where both have it in one shape."""
    theirs = dict(other.named_parameters())
    pairs = ((name, value, theirs.get(name)) for name, value in plain.named_parameters())
    return {
        name: _norm(found.detach().float() - value.detach().float()) / max(_norm(value.detach().float()), 1e-30)
        for name, value, found in pairs
        if found is not None and found.shape == value.shape
    }


def _whole(shares: dict[str, float], plain: nn.Module) -> float:
    """The share of all these weights together."""
    norms = {name: _norm(plain.get_parameter(name).detach().float()) for name in shares}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    return math.sqrt(sum((shares[name] * norm) ** 2 for name, norm in norms.items())) / max(whole, 1e-30)


def _norm(value: Tensor) -> float:
    return float(value.double().norm())
