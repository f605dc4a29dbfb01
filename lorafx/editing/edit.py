"""Knowledge editing: teach a causal language model one continuation by changing very few weights, as a sparse patch.

An edit is a rewrite with `rose-lora`, a short training and a merge; the patch is the difference from the checkpoint.
Figures are measured on the base with that patch applied, so they hold for the patch, not for the training.
Source: RoseLoRA, arXiv 2406.10777, and the knowledge-editing part of its code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import repeat
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

from ..errors import UsageError, did_you_mean
from ..frontend.capture import capture
from ..graph.tree import has_tensor, tensor_hash
from ..models.hub import local_folder
from ..models.tasks import loss_type
from ..passes.rose_lora import RoseLoRA
from ..pipeline import merge, rewrite
from ..public import Program
from ..reporting.render import draw_text, section_of
from .continuations import Encoder, inputs_of, says, top_tokens
from .patch import Patch, make, program_name
from .patch_folder import slots
from .requests import EditOptions, EditRequest


@dataclass(frozen=True)
class Outcome:
    """What came of one edit, measured with its patch applied (with all patches, when edits follow one another).

    Attributes:
        prompt, target: the request
        success: whether the greedy continuation of the prompt is the target
        before: whether it was before the edit
        paraphrases: the same for each paraphrase
        near: share of the edit's own locality prompts whose most likely next token stays
        locality: share of the unrelated prompts whose most likely next token stays; None without such prompts
        changed: weights this edit changed
        share: of the weights in the adapted matrices
        steps: optimiser steps taken
        seconds: of training, merging and making the patch
    """

    prompt: str
    target: str
    success: bool
    before: bool
    paraphrases: tuple[bool, ...]
    near: float | None
    locality: float | None
    changed: int
    share: float
    steps: int
    seconds: float

    def row(self) -> dict[str, Any]:
        """One line of the table people read."""
        return {
            "edit": f"{self.prompt} → {self.target}",
            "success": self.success,
            "paraphrases": f"{sum(self.paraphrases)} of {len(self.paraphrases)}",
            "near": _percent(self.near),
            "locality": _percent(self.locality),
            "changed": self.changed,
            "share": f"{self.share:.3%}",
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class EditResult:
    """What :func:`edit` did: an outcome for each edit, and one patch for all (``sequential``) or one for each."""

    outcomes: tuple[Outcome, ...]
    patches: tuple[Patch, ...]
    sequential: bool
    adapted: int
    options: EditOptions

    def summary(self) -> dict[str, Any]:
        """Shares over all edits."""
        every = [hit for outcome in self.outcomes for hit in outcome.paraphrases]
        return {
            "edits": len(self.outcomes),
            "success": _mean([outcome.success for outcome in self.outcomes]),
            "paraphrase_success": _mean(every),
            "near": _mean([outcome.near for outcome in self.outcomes if outcome.near is not None]),
            "locality": _mean([outcome.locality for outcome in self.outcomes if outcome.locality is not None]),
            "lowest_locality": min((o.locality for o in self.outcomes if o.locality is not None), default=None),
            "changed": max((patch.changed for patch in self.patches), default=0),
            "share": max((patch.changed for patch in self.patches), default=0) / self.adapted,
            "adapted_weights": self.adapted,
            "seconds": sum(outcome.seconds for outcome in self.outcomes),
        }

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, without the patches."""
        return {
            "sequential": self.sequential,
            "summary": self.summary(),
            "options": asdict(self.options),
            "edits": [asdict(outcome) for outcome in self.outcomes],
        }

    def text(self, width: int = 160) -> str:
        """The result for people."""
        rows = [outcome.row() for outcome in self.outcomes]
        return draw_text([], [section_of("Edits", rows), section_of("Together", self.summary())], width)


def edit(
    checkpoint: str | PathLike[str],
    edits: Sequence[EditRequest],
    *,
    prompts: Sequence[str] = (),
    sequential: bool = True,
    options: EditOptions | None = None,
    say: Callable[[str], None] = lambda line: None,
    **changes: Any,
) -> EditResult:
    """Edit a causal language model, one edit at a time.

    Args:
        checkpoint: its folder, with a tokenizer; it is only read
        edits: what it is to say
        prompts: unrelated prompts, to measure what else changes
        sequential: make each edit on the result of the one before, into one patch; else each on the checkpoint, into a
            patch each
        options: how to edit; ``changes`` replace single options
        say: called with a line for each edit made

    Raises:
        UsageError: no causal language model, targets that match nothing, unknown options, or nothing to do
        ArtifactError: the checkpoint cannot be opened, or stores its weights in another form than the opened model has
    """
    known = [entry.name for entry in fields(EditOptions)]
    for name in changes.keys() - set(known):
        raise UsageError(f"unknown option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    if not edits:
        raise UsageError("no edits: give at least one prompt and target")
    chosen = replace(options or EditOptions(), **changes)
    if chosen.steps < chosen.end:
        raise UsageError(f"{chosen.steps} steps end before the update is sparse, at step {chosen.end}; give more steps")
    editor = _Editor(local_folder(checkpoint), chosen, prompts)
    current, made = editor.base, []
    for number, request in enumerate(edits, 1):
        work = editor.work(current, request)
        made.append(work)
        say(f"edit {number} of {len(edits)}: {work.patch.changed:,} weights, {work.steps} steps, {work.seconds:.1f} s")
        if sequential:
            current = work.patch.apply_to(current)
    views = repeat(editor.view(current)) if sequential else map(editor.view, (w.patch.apply_to(current) for w in made))
    outcomes = tuple(editor.outcome(*each) for each in zip(edits, made, views, strict=False))
    patches = (editor.between(editor.base, current),) if sequential else tuple(work.patch for work in made)
    return EditResult(outcomes, patches, sequential, editor.adapted, editor.options)


@dataclass(frozen=True)
class _Work:
    patch: Patch
    steps: int
    seconds: float


@dataclass(frozen=True)
class _View:
    model: Any
    locality: float | None


class _Editor:
    """A captured checkpoint, and what its edits share."""

    def __init__(self, checkpoint: Path, options: EditOptions, prompts: Sequence[str]):
        self.options = options
        self.base = capture(checkpoint, "text-generation")
        if loss_type(self.base.source.model) != "ForCausalLM" or self.base.source.fresh:
            raise UsageError(f"{checkpoint}: {self.base.name} is not a causal language model with a head of its own")
        self.step = _step(options)
        #: The checkpoint's name of each of the program's tensors that it stores.
        self.names = {program_name(self.base, (name,)): name for name in slots(checkpoint) if _held(self.base, name)}
        self.adapted = self._adapted(checkpoint)
        limit = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        self.encoder = Encoder(checkpoint, limit)
        self.model = self.base.module().eval()
        self.prompts = [self.encoder.prompt(text) for text in prompts]
        self.tops = top_tokens(self.model, self.prompts)

    def _adapted(self, checkpoint: Path) -> int:
        """How many weights the adapted matrices have, after checking that they are opened as they are stored."""
        held = slots(checkpoint)
        weights = {site.parameter for site in self.step.sites(self.base).taken}
        for name in sorted(weights):
            stored = held[self.names[name]].read() if name in self.names else None
            if stored is None or tensor_hash(stored) != tensor_hash(self.base.tensor(name)):
                form = "not at all" if stored is None else f"in another form ({stored.dtype}, {tuple(stored.shape)})"
                raise UsageError(
                    f"{checkpoint}: {name} is stored {form}, so a patch of the files cannot change it; "
                    "save the opened model again and edit that"
                )
        return sum(self.base.tensor(name).numel() for name in weights)

    def work(self, current: Program, request: EditRequest) -> _Work:
        """Make one edit on ``current``."""
        started = time.perf_counter()
        trained, steps = self._trained(current, request)
        # Merged, not folded: fold() also takes dead channels out, and a patch needs every tensor in its shape.
        merged = merge(trained, check=False)
        patch = self.between(current, merged).noting(prompt=request.prompt, target=request.target)
        return _Work(patch, steps, time.perf_counter() - started)

    def _trained(self, current: Program, request: EditRequest) -> tuple[Program, int]:
        options = self.options
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(options.seed)
            program = rewrite(current, [self.step], check=False)
        # The evaluation graph can train too, and without dropout what is fitted is what is generated.
        model = program.module().eval()
        model.total_steps = options.steps
        optimiser = torch.optim.Adam(model.parameter_groups(lr=options.learning_rate))
        prompt, target = self.encoder.pair(request.prompt, request.target)
        chosen, first = torch.tensor(target, device=current.device), len(prompt) - 1
        before, near = _said(model, prompt)[:first], self._near(model, request)
        for step in range(options.steps):
            logits = _logits(model, prompt + target)
            wanted = logits[first:-1]
            if step >= options.end and options.margin is not None and _lead(wanted, chosen) >= options.margin:
                return program, step
            loss = F.cross_entropy(wanted, chosen)
            if options.prefix_weight > 0 and first > 0:
                loss = loss + options.prefix_weight * _divergence(logits[:first], before)
            for row, said in near:
                loss = loss + options.locality_weight / len(near) * _divergence(_logits(model, row), said)
            optimiser.zero_grad()
            loss.backward()
            model.before_step()
            optimiser.step()
            model.after_step()
        return program, options.steps

    def _near(self, model: Any, request: EditRequest) -> list[tuple[list[int], Tensor]]:
        """The edit's locality prompts and what the model says after their tokens; none if their weight is 0."""
        if self.options.locality_weight <= 0:
            return []
        rows = [self.encoder.prompt(text) for text in request.locality]
        return [(row, _said(model, row)) for row in rows]

    def between(self, before: Program, after: Program) -> Patch:
        """The patch from one program to another, by the checkpoint's names."""
        if after.config_changes:
            raise UsageError("an edit cannot change a tied weight alone; leave the output layer out of the targets")
        pairs = {self.names[name]: (before.tensor(name), after.tensor(name)) for name in self.names}
        moved = {name: pair for name, pair in pairs.items() if pair[0].data_ptr() != pair[1].data_ptr()}
        # Merging adds 0 to the weights outside the support, which turns -0 into 0: an equal weight is not a change.
        new = {name: torch.where(a == b, a, b) for name, (a, b) in moved.items()}
        return make({name: a for name, (a, _) in moved.items()}, new)

    def view(self, program: Program) -> _View:
        """The program as a model, and the share of the unrelated prompts that it continues as the base does."""
        model = program.module().eval()
        return _View(model, _share(self.tops, top_tokens(model, self.prompts)))

    def outcome(self, request: EditRequest, work: _Work, view: _View) -> Outcome:
        """The outcome of an edit, on the model it led to."""
        pairs = [self.encoder.pair(text, request.target) for text in (request.prompt, *request.paraphrases)]
        rows = [self.encoder.prompt(text) for text in request.locality]
        hits = says(view.model, pairs)
        return Outcome(
            prompt=request.prompt,
            target=request.target,
            success=hits[0],
            before=says(self.model, pairs[:1])[0],
            paraphrases=tuple(hits[1:]),
            near=_share(top_tokens(self.model, rows), top_tokens(view.model, rows)),
            locality=view.locality,
            changed=work.patch.changed,
            share=work.patch.changed / self.adapted,
            steps=work.steps,
            seconds=work.seconds,
        )


def _step(options: EditOptions) -> RoseLoRA:
    return RoseLoRA(
        targets=options.targets,
        blocks=options.blocks,
        rank=options.rank,
        alpha=options.alpha,
        density=options.density,
        start=float(options.start),
        end=float(options.end),
        clamp=options.clamp,
    )


def _held(program: Program, name: str) -> bool:
    prefix = getattr(program.source.model, "base_model_prefix", "")
    return has_tensor(program.root, name) or has_tensor(program.root, f"{prefix}.{name}")


def _logits(model: Any, row: list[int]) -> Tensor:
    """The logits (row, vocabulary) after each token of a row, in fp32."""
    return model(**inputs_of(model, [row])).logits[0].float()


def _lead(logits: Tensor, target: Tensor) -> float:
    """The margin of the target's logits over the best others, at the token where it is smallest."""
    chosen = target[:, None]
    best = logits.detach().scatter(1, chosen, -torch.inf).max(1).values
    return float((logits.detach().gather(1, chosen)[:, 0] - best).min())


@torch.no_grad()
def _said(model: Any, row: list[int]) -> Tensor:
    """The log-probabilities (row, vocabulary) of what the model says now after each token of a row."""
    return _logits(model, row).log_softmax(-1)


def _divergence(logits: Tensor, said: Tensor) -> Tensor:
    """The mean over tokens of the KL divergence of the logits' distribution from what was said."""
    return F.kl_div(logits.log_softmax(-1), said, reduction="batchmean", log_target=True)


def _share(before: list[int], after: list[int]) -> float | None:
    return _mean([a == b for a, b in zip(before, after, strict=True)])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
