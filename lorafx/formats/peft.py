"""The adapter format of Hugging Face PEFT: which key each tensor has, and the config that adapts the same modules.

One file serves both readers. A run folder's keys are PEFT's, whatever was inserted; ``adapter_config.json`` is written
when PEFT's LoRA computes the same function from them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..files.places import checkpoint_name, place_from
from ..graph.site import STACK, module_path
from ..graph.tree import below, get_tensor, has_tensor, named_tensors, same_values, ties

if TYPE_CHECKING:
    from ..graph.program import Inserted, Program
    from ..graph.site import Site
    from ..methods.low_rank import LowRank

PREFIX = "base_model.model."

#: Task types by the ending of the model's class name, and the heads that PEFT adds to ``modules_to_save`` by itself.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
}
_LOW_RANK = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


class _InexpressibleError(Exception):
    """PEFT cannot compute this program's function; the message says why."""


@dataclass(frozen=True)
class _Adapted:
    """One module that a pass of the LoRA family adapted."""

    module: str
    step: LowRank
    site: Site
    rank: int


def adapter_keys(program: Program) -> dict[str, str]:
    """The key in ``adapter_model.safetensors`` of every tensor in ``program.learned()``, by its name.

    PEFT moves the weight of an adapted module to its ``base_layer``; all other names are the model's own. Around a
    module with stacks it puts a wrapper for each, in the order of the parameters, which has the stack's A and B.
    """
    entries = [entry for applied in program.history for entry in applied.inserted]
    adapted = {entry.module for entry in entries if any(pair <= set(entry.tensors) for pair in _LOW_RANK)}
    inserted = {name for entry in entries for name in entry.tensors.values()}
    wrappers = _wrappers(program, adapted)
    keys = {}
    for name in program.learned():
        owner, _, leaf = name.rpartition(".")
        depth = len(wrappers.get(owner, ())) if name not in inserted else 0
        keys[name] = PREFIX + owner + ".base_layer" * depth + (f".{leaf}" if owner else leaf)
    for owner, stack in ((owner, name) for owner, names in wrappers.items() for name in names if name != owner):
        depth = len(wrappers[owner]) - 1 - wrappers[owner].index(stack)
        for entry in (entry for entry in entries if entry.module == stack):
            for short, name in _named_pair(program, entry).items():
                keys[name] = PREFIX + owner + ".base_layer" * depth + f".{short}.weight"
    return keys


def _wrappers(program: Program, adapted: Collection[str]) -> dict[str, list[str]]:
    """What is adapted in each module, in the order in which PEFT wraps it, innermost first: the module itself, or its
    parameters that are stacks."""
    found: dict[str, list[str]] = {}
    for name, value in named_tensors(program.source.model):  # in the parameters' own order
        if name in adapted and value.dim() == 3:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    return {**{path: [path] for path in adapted}, **found}


def _named_pair(program: Program, entry: Inserted) -> dict[str, str]:
    """The one A and B at an entry that have the names which its first pass gives them."""
    pair = {short: name for short, name in entry.tensors.items() if short in ("lora_A", "lora_B")}
    return {s: name for s, name in pair.items() if name == below(program.source.model, entry.module, f"{s}.weight")}


def adapter_config(program: Program) -> tuple[dict[str, Any] | None, str]:
    """The ``adapter_config.json`` with which PEFT computes this program's function; or None, and why there is none."""
    try:
        if waiting := program.waiting():
            raise _InexpressibleError(f"{waiting[0]} has its values when the run is opened with the base's weights")
        adapted = _adapted(program)
        _check_rest(program, adapted)
        modules = {entry.module for entry in adapted}
        paths = [path for path, _ in program.source.model.named_modules(remove_duplicate=False) if path]
        stacks = [entry.module for entry in adapted if entry.site.kind == STACK]
        saved = _saved_modules(program, {*modules, *(name.rpartition(".")[0] for name in stacks)}, paths)
        config = {
            "peft_type": "LORA",
            "task_type": _task_type(program.name, paths, saved),
            "base_model_name_or_path": _base_of(program),
            "inference_mode": True,
            "target_modules": exact_targets(modules - set(stacks), paths),
            **({"target_parameters": _exact_parameters(program, stacks)} if stacks else {}),
            "modules_to_save": saved or None,
            "bias": "none",
            "fan_in_fan_out": _stored_in_out(adapted),
            **_scales(adapted),
        }
    except _InexpressibleError as reason:
        return None, str(reason)
    return config, ""


def _base_of(program: Program) -> str | None:
    """The name by which PEFT opens the base: its name on the hub if it came from there, else its path as this process
    sees it (PEFT, too, keeps the path that it was given)."""
    path = program.source.path
    if path is None:
        return None
    name = checkpoint_name(path)
    return name if "/" in name else place_from(".", path)


# ---- which modules are adapted


def _adapted(program: Program) -> list[_Adapted]:
    from ..methods.low_rank import LowRank

    sites = {site.module: site for site in program.sites() if program.roles.get(site.parameter) != "adapter"}
    tied = ties(program.root)
    result: list[_Adapted] = []
    seen: set[str] = set()
    for applied in program.history:
        for entry in applied.inserted:
            factors = {name for name in entry.tensors.values() if program.roles[name] != "statistic"}
            if factors <= seen:  # a pass that only steers what an earlier one inserted, or keeps statistics
                continue
            seen |= factors
            if not isinstance(applied.step, LowRank) or not _plain_pair(program, entry, tied):
                raise _InexpressibleError(f"{applied.step.pass_name()} inserted what PEFT's LoRA does not have")
            if entry.module not in sites or not _supported(program, sites[entry.module]):
                raise _InexpressibleError(f"PEFT cannot adapt {entry.module}")
            first = next(name for short, name in entry.tensors.items() if short.endswith("_A"))
            rank = program.tensor(first).shape[0] // sites[entry.module].matrices
            result.append(_Adapted(entry.module, applied.step, sites[entry.module], rank))
    if not result:
        raise _InexpressibleError("no LoRA adapter was inserted")
    return result


def _check_rest(program: Program, adapted: list[_Adapted]) -> None:
    """Raise unless the program is its base with plain LoRA, apart from tensors that the adapter file holds.

    This is checked, not assumed: a pass may change weights, or the graph, without inserting anything.
    """
    from ..graph.program import structure
    from ..methods.low_rank import ExactLora
    from ..pipeline import run, to_eval

    base = program.captured
    if base is None or program.origin is not None:
        raise _InexpressibleError("the program it was made from is not at hand")
    ranks = {entry.module: entry.rank for entry in adapted}
    scales = {entry.module: entry.step.scale_of(entry.site) for entry in adapted}
    # A program captured without weights needs no adapter values either: only the graph is checked.
    with torch.device("meta") if base.device.type == "meta" else nullcontext():
        plain = run(base, [ExactLora(targets=tuple(ranks), ranks=ranks, scales=scales)], check=False)
    if structure(to_eval(plain).graph) != structure(to_eval(program).graph):
        raise _InexpressibleError("it computes more than its base with LoRA beside some weights")
    held = {id(program.tensor(name)) for name in program.learned()}
    for name, value in named_tensors(base.root):
        mine = get_tensor(program.root, name) if has_tensor(program.root, name) else None
        if mine is None or (id(mine) not in held and not same_values(mine, value)):
            raise _InexpressibleError(f"{name} is not as in the base, and an adapter holds what was trained only")


def _plain_pair(program: Program, entry: Inserted, tied: Mapping[str, list[str]]) -> bool:
    """Whether a module got one A and one B of its own, under the names PEFT gives them (and statistics at most)."""
    tensors = {short: name for short, name in entry.tensors.items() if program.roles[name] != "statistic"}
    own = {short: below(program.source.model, entry.module, short) for short in tensors}
    named = all(name.removesuffix(".weight") == own[short] for short, name in tensors.items())
    return set(tensors) in _LOW_RANK and named and all(len(tied[name]) == 1 for name in tensors.values())


def _supported(program: Program, site: Site) -> bool:
    from transformers.pytorch_utils import Conv1D

    if site.kind == STACK:  # PEFT changes it while the module that owns it runs
        owner = site.parameter.rpartition(".")[0]
        return bool(owner) and module_path(site.node, owner) == owner
    try:
        module = program.source.model.get_submodule(site.module)
    except AttributeError:  # the weight is used outside a module of its own
        return False
    if module_path(site.node, site.module) != site.module:  # PEFT would wrap a module that never runs
        return False
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d))


def _stored_in_out(adapted: list[_Adapted]) -> bool:
    """Whether the matrices are stored (in, out). PEFT has one option for all, and corrects itself where they are mixed;
    with stacks it refuses the option."""
    return {entry.site.kind for entry in adapted} & {"linear", "addmm", STACK} == {"addmm"}


def exact_targets(wanted: Collection[str], paths: Iterable[str], stacks: Collection[str] = ()) -> list[str] | str:
    """The shortest ``target_modules`` that name the modules ``wanted`` among all ``paths``, and no other; ``stacks``
    are named with the module that they belong to."""
    short = _shortest(wanted, set(paths) - set(wanted), stacks)
    return short if short is not None else "|".join(re.escape(path) for path in sorted(wanted))


def _exact_parameters(program: Program, wanted: Collection[str]) -> list[str]:
    """The shortest ``target_parameters`` that name the parameters ``wanted`` and no other."""
    others = {name for name, _ in named_tensors(program.source.model)} - set(wanted)
    found = _shortest(wanted, others)
    if found is None:
        raise _InexpressibleError(f"the name of another parameter ends in {next(iter(wanted))}")
    return found


def _shortest(wanted: Iterable[str], others: Iterable[str], stacks: Collection[str] = ()) -> list[str] | None:
    """For each wanted path its shortest dotted suffix that is a suffix of none of ``others``; None if a path has
    none."""
    foreign = {ending for path in others for ending in _endings(path, path in stacks)}
    chosen: set[str] = set()
    for path in wanted:
        own = next((ending for ending in _endings(path, path in stacks) if ending not in foreign), None)
        if own is None:
            return None
        chosen.add(own)
    return sorted(chosen)


def _endings(path: str, stack: bool) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[-length:]) for length in range(min(1 + stack, len(parts)), len(parts) + 1)]


# ---- other learned tensors


def _saved_modules(program: Program, adapted: set[str], paths: list[str]) -> list[str]:
    """The modules that PEFT can keep as trained in full: those whose every tensor was learned, outermost only.

    All other learned tensors are in the file under their own names, and PEFT loads them into the model as they are: the
    function is the same, but PEFT does not know that they were trained.
    """
    learned = {name for name in program.learned() if program.roles[name] in ("base", "head", "unread")}
    # PEFT would train a copy of a tied tensor; under its own name it stays tied.
    tied = ties(program.root)
    learned = {name for name in learned if len(tied[name]) == 1}
    model = program.source.model
    state = set(model.state_dict(keep_vars=True))
    chosen: list[str] = []
    for path in sorted({parent for name in learned for parent in parents(name)}, key=len):
        inside = {name for name in state if name.startswith(path + ".")}
        free = not any(f"{module}.".startswith(f"{path}.") for module in adapted)
        outermost = not any(path.startswith(done + ".") for done in chosen)
        container = isinstance(model.get_submodule(path), (nn.ModuleDict, nn.ModuleList))
        if inside <= learned and free and outermost and not container:
            chosen.append(path)
    # PEFT matches these names as suffixes, even inside a path component, and leaves the modules inside out of LoRA.
    return [
        name
        for name in chosen
        if all(path in chosen for path in paths if path.endswith(name))
        and not any(re.match(rf"(^|.*\.){name}($|\..*)", module) for module in adapted)
    ]


def parents(name: str) -> list[str]:
    """The paths of the modules around a tensor or module, from the outside: ``a`` and ``a.b`` of ``a.b.c``."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _task_type(model: str, paths: list[str], saved: list[str]) -> str | None:
    """The task type of PEFT; None where PEFT would add modules of its own to ``saved``."""
    task, heads = next((found for ending, found in _TASKS.items() if model.endswith(ending)), (None, ()))
    return task if {path for path in paths if any(path.endswith(name) for name in heads)} <= set(saved) else None


# ---- ranks and scales


def _scales(adapted: list[_Adapted]) -> dict[str, Any]:
    """Rank, alpha and dropout with their exceptions."""
    rslora = all(getattr(entry.step, "rslora", False) for entry in adapted)
    stacked = any(entry.site.kind == STACK for entry in adapted)
    ranks = {entry.module: entry.rank for entry in adapted}
    # The divisor with which PEFT turns alpha back into the scale.
    divisors = {module: math.sqrt(rank) if rslora else rank for module, rank in ranks.items()}
    alphas = {e.module: _plain(e.step.scale_of(e.site) * divisors[e.module]) for e in adapted}
    rank, rank_pattern = _with_exceptions(ranks)
    alpha, alpha_pattern = _with_exceptions(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        # One number in PEFT, and none beside stacks; it matters to further training there, not to the function.
        "lora_dropout": 0.0 if stacked else max(entry.step.dropout for entry in adapted),
    }


def _plain(value: float) -> float | int:
    """``value`` without the rounding of a division and a multiplication; an integer where it is one."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others under the shortest names that say them."""
    common = Counter(values.values()).most_common(1)[0][0]
    pattern: dict[str, Any] = {}
    for value in sorted(set(values.values()) - {common}):
        modules = [module for module, own in values.items() if own == value]
        short = _shortest(modules, [module for module, own in values.items() if own != value])
        names = map(re.escape, short) if short is not None else (f"^{re.escape(module)}" for module in modules)
        pattern.update(dict.fromkeys(names, value))
    return common, pattern
