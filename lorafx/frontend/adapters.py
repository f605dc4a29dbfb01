"""Adapters that others trained, put on a captured base: each becomes the rewrite that a pass of the LoRA family makes.

Plain LoRA becomes what the ``lora`` pass inserts, so that it trains on; everything else becomes ordinary operators
beside it. Folding, streaming and exporting know nothing of where it came from.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..base import Pass
from ..errors import ArtifactError, UsageError, first_line
from ..files.folder import file_hash
from ..formats.adapter import WEIGHTS, Adapter, read_adapter
from ..formats.adapter_config import CONFIG, read_config_file
from ..formats.changes import Change, Factors, Rows, Stack, Whole
from ..formats.peft import exact_targets
from ..graph.program import P, Program
from ..graph.site import STACK
from ..graph.tree import tensor_hash, ties
from ..methods.adapted import AdapterLora, AdapterWeights, site_of
from ..methods.low_rank import named_by
from ..methods.stacks import StackShape
from ..models.hub import local_folder
from ..passes.lora import Lora
from ..pipeline import run

#: One adapter folder, several that are summed, or several with the weight of each.
Adapters: TypeAlias = "str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, float]"
#: What becomes a low-rank update beside a weight, or of a stack.
Branch: TypeAlias = Factors | Stack
#: Beginnings of the kinds that add inputs or states to a model, and change none of its weights.
_PROMPTS = ("PROMPT", "P_TUNING", "PREFIX", "ADAPTION", "CARTRIDGE", "MULTITASK", "CPT")


def weighted(adapters: Adapters) -> dict[Path, float]:
    """The folders and their weights."""
    one = isinstance(adapters, (str, PathLike))
    alike = [(path, 1.0) for path in ([adapters] if one else adapters)]
    given = [*adapters.items()] if isinstance(adapters, Mapping) else alike
    found = {local_folder(path): float(weight) for path, weight in given}
    if len({path.resolve() for path in found}) < len(given):  # under two names, too: adapter and adapter/ are one
        raise UsageError("an adapter was given twice; give it once, with a weight (FOLDER=2)")
    odd = next((path for path, weight in found.items() if not weight or not math.isfinite(weight)), None)
    if odd is not None:
        raise UsageError(f"{odd}: the weight {found[odd]} of an adapter leaves nothing of it or of the model")
    if not found:
        raise UsageError("no adapter was given")
    return found


def with_peft(model: nn.Module, adapters: Mapping[Path, float], *, own: bool) -> nn.Module | None:
    """``model`` with an adapter that is not LoRA inside, where PEFT puts it; None when all are LoRA.

    A model that is not our ``own`` is copied for that.

    Raises:
        ArtifactError: PEFT is not installed, or cannot open it
        UsageError: several adapters, or a weight, or one that does not change weights alone
    """
    kinds = {folder: read_config_file(folder)["peft_type"] for folder in adapters}
    folder = next((folder for folder, kind in kinds.items() if kind != "LORA"), None)
    if folder is None:
        return None
    kind = kinds[folder]
    if len(adapters) > 1 or adapters[folder] != 1.0:
        raise UsageError(f"{folder}: a {kind} adapter stands alone and at weight 1; only LoRA can be summed")
    if kind.startswith(_PROMPTS):
        raise UsageError(f"{folder}: a {kind} adapter adds inputs, not weights; nothing of it can be folded")
    if find_spec("peft") is None:
        raise ArtifactError(f"{folder}: a {kind} adapter is read by PEFT, which is not installed (pip install peft)")
    from peft import PeftModel

    try:
        opened: Any = PeftModel.from_pretrained(cast(Any, model if own else copy.deepcopy(model)), folder)
        return opened.base_model.model.eval()
    except Exception as error:  # every kind of adapter has errors of its own
        raise ArtifactError(f"{folder}: PEFT cannot put it on this base: {first_line(error)}") from error


def read_adapters(adapters: Mapping[Path, float]) -> list[tuple[Adapter, float]]:
    """The LoRA adapters in some folders, each with its weight."""
    return [(read_adapter(folder), weight) for folder, weight in adapters.items()]


def resize(model: Any, adapters: Iterable[tuple[Adapter, float]]) -> None:
    """Give the model the vocabulary that an adapter saved embeddings of; what is new is in the adapter's file.

    ArtifactError when it is not: rows would be random.
    """
    for adapter, _ in adapters:
        size = adapter.resized(model)
        if size is None:
            continue
        before = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
        with torch.random.fork_rng(devices=()):
            model.resize_token_embeddings(size, mean_resizing=False)
        tied = {id(value): name for name, value in model.named_parameters(remove_duplicate=False)}
        grown = {id(value) for name, value in model.named_parameters() if value.shape != before.get(name)}
        given = {id(model.get_parameter(change.name)) for change in adapter.changes(model) if isinstance(change, Whole)}
        if grown - given:
            name = tied[(grown - given).pop()]
            raise ArtifactError(f"{adapter.folder}: its vocabulary has {size} tokens, and it holds no rows for {name}")


def adapted(program: P, adapters: Sequence[tuple[Adapter, float]]) -> P:
    """``program`` with LoRA adapters beside its weights, their updates multiplied by their weights and summed.

    Raises:
        ArtifactError: an adapter that does not fit the model
        UsageError: adapters that cannot be summed
    """
    changes = [(adapter, weight, adapter.changes(program.source.model)) for adapter, weight in adapters]
    _check_sum(changes)
    for adapter, weight, found in changes:
        plain = _is_plain(program, adapter, found)
        heads = _heads(program, found) if plain else {}
        branches = [c for c in found if isinstance(c, Factors) or (plain and isinstance(c, Stack))]
        program = _weights(program, adapter, weight, [c for c in found if c not in heads and c not in branches])
        program = _branches(program, adapter, weight, branches, heads if plain else None)
    if not adapters:
        return program
    learned = learned_digest(program)
    added = tuple({**added_record(adapter.folder, weight), "learned": learned} for adapter, weight in adapters)
    source = dataclasses.replace(program.source, added=(*program.source.added, *added))
    return dataclasses.replace(program, source=source)


def learned_digest(program: Program) -> str:
    """A digest of passes and of what was learned: whether a program is still what its adapters made of it."""
    learned = sorted((name, tensor_hash(value)) for name, value in program.learned().items())
    steps = [applied.step.pass_name() for applied in program.history]
    return hashlib.sha256(json.dumps([steps, learned]).encode()).hexdigest()


def added_record(folder: Path, weight: float) -> dict[str, Any]:
    """What a certificate says of an adapter: where it is, how it is weighted, and the sha256 of its files."""
    files = {name: file_hash(folder / name) for name in (CONFIG, WEIGHTS) if (folder / name).is_file()}
    return {"path": str(folder.absolute()), "weight": weight, "files": files}


def _check_sum(changes: Sequence[tuple[Adapter, float, list[Change]]]) -> None:
    """UsageError for adapters whose function is not a weighted sum: two values of one tensor, or lengths (DoRA)."""
    taken: dict[str, Path] = {}
    for adapter, weight, found in changes:
        for change in found:
            linear = isinstance(change, Stack) or (isinstance(change, Factors) and change.magnitude is None)
            if linear:
                continue
            if weight != 1.0:
                raise UsageError(
                    f"{adapter.folder}: {change.name} is replaced, which a weight of {weight:g} cannot scale; give it 1"
                )
            if taken.get(change.name, adapter.folder) != adapter.folder:
                raise UsageError(f"{taken[change.name]} and {adapter.folder} both replace {change.name}; take one")
            taken[change.name] = adapter.folder
        names = {change.name for change in found}
        others = {c.name for other, _, more in changes if other is not adapter for c in more}
        both = next((name for name in names & others if name in taken), None)
        if both is not None:
            raise UsageError(f"{taken[both]} replaces {both}, which another adapter updates; they cannot be summed")


# ---- weights themselves


def _weights(program: P, adapter: Adapter, weight: float, changes: list[Change]) -> P:
    stacks = {c.name: c for c in changes if isinstance(c, Stack)}
    rows = {c.name: c for c in changes if isinstance(c, Rows)}
    tied = ties(program.root)
    # PEFT saves tables beside their adapters; a table that equals the base is not a change.
    whole = {c.name: c for c in changes if isinstance(c, Whole) and not _same(program, c)}
    copies = {name for name, c in whole.items() if not c.tied and len(tied[name]) > 1}
    if not (stacks or rows or whole):
        return program
    used = {name for name, _, _ in _uses(program)}
    for name in [*stacks, *rows]:
        if not used & set(tied[name]):
            raise ArtifactError(f"{adapter.folder}: it changes {name}, which the model does not run")
    shapes = {
        c.name: StackShape(len(c.a) // c.experts, c.experts, c.transposed, c.scale * weight) for c in stacks.values()
    }
    places = {name: site_of(program, name).module for name in [*stacks, *rows]}
    step = AdapterWeights(
        stacks=shapes,
        rows={name: c.rows for name, c in rows.items()},
        whole=tuple(name for name in whole if name not in copies),
        copies=tuple(sorted(copies)),
    )
    result = run(program, [step], check=False)
    values: dict[str, Tensor] = {name: c.value for name, c in whole.items()}
    for name, module in places.items():
        held, leaf = _inserted(result, module), name.rpartition(".")[2]
        if name in stacks:
            values |= {held[f"{leaf}_lora_A"]: stacks[name].a, held[f"{leaf}_lora_B"]: stacks[name].b}
        else:
            values[held[f"{leaf}_rows"]] = rows[name].values
    result.load(values)
    return result


def _uses(program: Program) -> list[tuple[str, str, str]]:
    return [(site.parameter, site.module, site.kind) for site in program.sites()]


def _same(program: Program, change: Whole) -> bool:
    old = program.tensor(change.name)
    return change.tied and not old.is_meta and old.dtype == change.value.dtype and torch.equal(old, change.value)


def _inserted(program: Program, module: str) -> dict[str, str]:
    """What the last pass inserted at a module, by short names."""
    return next((entry.tensors for entry in program.history[-1].inserted if entry.module == module), {})


# ---- branches beside weights


def _branches(
    program: P, adapter: Adapter, weight: float, changes: list[Branch], heads: Mapping[Whole, str] | None
) -> P:
    """``program`` with low-rank updates; by the ``lora`` pass, with the modules that train in full, if there are
    ``heads``."""
    if not changes:
        return program
    used = {module for _, module, _ in _uses(program)}
    for change in changes:
        name = _module(change)
        if name not in used:
            raise ArtifactError(f"{adapter.folder}: it adapts {name}, which the model does not run by itself")
    plain = heads is not None
    step = _lora(program, adapter, weight, changes, heads) if plain else _any_lora(adapter, weight, changes)
    flip = -1.0 if plain and weight < 0 else 1.0  # the scale of the pass is positive
    result = run(program, [step], check=False)
    values: dict[str, Tensor] = {change.name: change.value for change in heads or ()}
    for change in changes:
        held = _inserted(result, _module(change))
        for name, value in _values(change, flip).items():
            if value is not None:
                slot = result.tensor(held[name])
                values[held[name]] = value.reshape(slot.shape)
    result.load(values)
    return result


def _module(change: Branch) -> str:
    """What the weight is called that a low-rank update is of."""
    return change.module if isinstance(change, Factors) else change.name


def _values(change: Branch, flip: float) -> dict[str, Tensor | None]:
    """The tensors of a low-rank update, by the short names that passes give them."""
    if isinstance(change, Stack):
        return {"lora_A": change.a, "lora_B": change.b * flip}
    short = "lora_embedding_" if change.use.kind == "embedding" else "lora_"
    given = {f"{short}A": change.a, f"{short}B": change.b * flip, "lora_magnitude_vector": change.magnitude}
    return {**given, "lora_B.bias": None if change.shift is None else change.shift * flip}


def _is_plain(program: Program, adapter: Adapter, changes: list[Change]) -> bool:
    """Whether the ``lora`` pass makes its low-rank updates."""
    config, factors = adapter.config, [change for change in changes if isinstance(change, Factors)]
    stacks = [change for change in changes if isinstance(change, Stack)]
    fits = all(len(change.a) <= min(change.use.size(program.tensor(change.name).shape)) for change in factors)
    kinds = {module: kind for _, module, kind in _uses(program)} if stacks else {}
    fits &= all(kinds.get(change.name) == STACK and _holds(program, change) for change in stacks)
    fits &= not (stacks and config.lora_dropout)
    same = not config.use_dora and not any(change.shift is not None for change in factors)
    return bool(factors or stacks) and fits and same and min(config.lora_alpha, *config.alpha_pattern.values(), 1.0) > 0


def _holds(program: Program, change: Stack) -> bool:
    return len(change.a) // change.experts <= min(program.tensor(change.name).shape[-2:])


def _heads(program: Program, changes: list[Change]) -> dict[Whole, str]:
    """The changes that training a module in full makes, each with the module: all of it, none of it tied."""
    tied = ties(program.root)
    copies = {c.name: c for c in changes if isinstance(c, Whole) and not c.tied and len(tied[c.name]) == 1}
    owners = {change: name.rpartition(".")[0] for name, change in copies.items()}
    held = {
        path: {f"{path}.{n}" for n, _ in program.root.get_submodule(path).named_parameters()}
        for path in owners.values()
    }
    return {change: path for change, path in owners.items() if held[path] <= copies.keys()}


def _lora(program: Program, adapter: Adapter, weight: float, changes: list[Branch], heads: Mapping[Whole, str]) -> Pass:
    config = adapter.config
    paths = [path for path, _ in program.source.model.named_modules(remove_duplicate=False) if path]
    # What answers to a name in a recipe is more than PEFT's modules: stacks by the name of their parameter.
    stacks = {module for _, module, kind in _uses(program) if kind == STACK}
    targets = exact_targets([_module(change) for change in changes], [*paths, *stacks], stacks)

    def named(key: str) -> bool:
        return any(named_by(key, _module(change)) for change in changes)

    return Lora(
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank=config.r,
        alpha=config.lora_alpha * abs(weight),
        rslora=config.use_rslora,
        # Of PEFT's keys those that name something here: it takes any.
        rank_pattern={key: value for key, value in config.rank_pattern.items() if named(key)},
        alpha_pattern={key: value * abs(weight) for key, value in config.alpha_pattern.items() if named(key)},
        dropout=config.lora_dropout,
        trainable=tuple(dict.fromkeys(heads.values())),
    )


def _any_lora(adapter: Adapter, weight: float, changes: list[Branch]) -> Pass:
    factors = [change for change in changes if isinstance(change, Factors)]
    return AdapterLora(
        targets=tuple(f"name:{change.module}" for change in factors),
        ranks={change.module: len(change.a) for change in factors},
        scales={change.module: change.scale * weight for change in factors},
        decomposed=adapter.config.use_dora,
        shifted=any(change.shift is not None for change in factors),
        trainable=(),
    )
