"""Training: HF Trainer over a rewritten model.

Three ways in. :func:`train` takes a program and a table and does everything. :class:`Trainer` is transformers' own with
the methods' loss terms and steps added (:class:`MethodTrainerMixin` adds them to any subclass of it), for scripts of
one's own. A plain PyTorch loop needs neither::

    model = program.module()
    for batch in batches:
        model(**batch).loss.backward()  # a loss of your own: + (model.penalty() or 0)
        model.before_step(); optimizer.step(); model.after_step()
        optimizer.zero_grad()
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainingArguments, default_data_collator
from transformers.trainer_callback import PrinterCallback

from ..errors import UsageError, first_line
from ..graph.tree import get_tensor, has_tensor, persistent, put_tensor
from ..models.tasks import loss_type
from ..recipes.options import TrainOptions
from ..recipes.recipe import parse_options
from ..recipes.trainer import check_training
from .arguments import saves, training_arguments
from .collating import Collator
from .data import prepare, splits, tokenizer_of, warn_of_one_class, warn_of_random
from .diverged import StopDiverged, refuse_diverged
from .folder import output_folder, resumed
from .interrupt import saving_at_interrupt
from .metrics import Metric, measured_by, metric_of
from .module import RewrittenModel, build_module
from .rows import Prepared, Rows
from .samples import samples_of
from .trainer import Progress, Trainer, rewritten_model

if TYPE_CHECKING:
    from ..graph.program import Program


@dataclass(frozen=True)
class TrainResult:
    """What a training gave. The program's own tensors hold what was learned.

    Attributes:
        metrics: ``train_loss``, ``steps``, ``epochs``; with evaluation data ``eval_loss`` and what else was measured
            (``eval_accuracy``, ``eval_f1``, ``eval_perplexity`` …), of the weights the program ended with
        history: every log entry of HF Trainer, oldest first
        seconds: wall time of the training, its evaluations included
        best_step: the optimiser step whose weights were kept, when ``keep_best`` chose them; None as well when no
            evaluation came after the schedules of the methods: the weights are then those of the last step
        is_main: whether this process is the one that writes results (the first one under ``torchrun``)
        samples: for some evaluation rows of a causal model the ``prompt``, what was ``wanted`` and what was ``written``
        rows_cut: how many training rows were longer than ``max_length`` and lost their end
        metric: which of ``metrics`` says most, with evaluation data; None when that is its loss
        passes: the names of the passes that the model had when it trained, oldest first
        evaluated: sha256 of the evaluation rows, which tells scores on the same ones; None for those that are made as
            they are read (images), and for a caller's own dataset
    """

    metrics: dict[str, float]
    history: tuple[dict[str, Any], ...]
    seconds: float
    best_step: int | None = None
    is_main: bool = True
    rows_cut: int = 0
    samples: tuple[dict[str, str], ...] = ()
    metric: str | None = None
    passes: tuple[str, ...] = ()
    evaluated: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        listed = {name: list(getattr(self, name)) for name in ("history", "samples", "passes")}
        return {**dataclasses.asdict(self), **listed}


def train(
    program: Program,
    data: Any,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    collator: Any = None,
    teacher: Program | None = None,
    compute_metrics: Callable[[Any], Mapping[str, float]] | None = None,
    output_dir: str | PathLike[str] | None = None,
    resume: bool | str | PathLike[str] = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = True,
    **options: Any,
) -> TrainResult:
    """Train ``program`` in place on a table of texts (or a dataset of its inputs), with HF Trainer.

    A sequence classifier learns the column ``label`` from ``text`` (and ``text_pair``), a masked language model learns
    from ``text`` alone, an encoder-decoder writes ``label``. A causal language model learns ``text`` and its end, or
    with ``label`` what follows it and nothing of the text. A token classifier learns the ``tags`` of ``tokens``, one
    that answers questions where the ``answers`` to a ``question`` stand in its ``context``, a classifier of images the
    ``label`` of an ``image``; a sentence encoder brings ``text`` and ``text_pair`` near each other. Under
    ``torchrun`` every process calls this.

    Args:
        data: a csv, tsv, jsonl, json or parquet file, a mapping of columns, rows, a frame of pandas, a folder with a
            folder of images for each class, a ``datasets.Dataset`` of columns or of model inputs, or a
            ``DatasetDict``, of which ``train`` is learned and ``validation`` (else ``test``) evaluated
        eval_data: the same, evaluated before the first step and after every epoch
        tokenizer: the tokenizer, or the image processor; read from the checkpoint folder when None
        collator: makes batches of a dataset of model inputs; without, a tokenizer pads them, labels of tokens with -100
        teacher: whose answers and hidden states are learned, if the options ``distill`` and ``distill_hidden`` ask for
            it; by default the program as it is before this training
        compute_metrics: what is measured instead of the task's own metric, as HF Trainer calls it: given the whole
            outputs (``predictions``) and ``label_ids`` of an evaluation, figures by name
        output_dir: where resumable checkpoints go, one more when training is interrupted; a temporary folder when None
        resume: True to go on from the last checkpoint in ``output_dir``, or the folder of one
        callbacks: transformers callbacks
        progress: show a progress bar on stderr
        options: the fields of :class:`~lorafx.recipes.options.TrainOptions`

    Raises:
        UsageError: an unknown option, nothing to train, data that does not fit the model
        ArtifactError: a data file or a checkpoint that cannot be used
    """
    settings = parse_options(TrainOptions, options, "training options")
    check_training(settings)
    data, eval_data = splits(data, eval_data)
    _check(program, settings, eval_data, output_dir, resume)
    warn_of_random(program)
    teacher = _teacher(program, settings, teacher)
    tokenizer = tokenizer_of(program) if tokenizer is None else tokenizer
    if settings.samples and tokenizer is None:
        raise UsageError(f"{program.name} was captured without a tokenizer; pass tokenizer=, or leave samples out")
    rows, held_out = _prepared(program, data, eval_data, tokenizer, settings, collator)
    metric = _metric(program, held_out, compute_metrics)
    with output_folder(output_dir) as folder:
        checkpoint = resumed(folder, resume)
        arguments = training_arguments(settings, folder, held_out is not None, metric, progress)
        arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
        measures = measured_by(metric, compute_metrics)
        home = program.device  # a trainer moves it at once
        trainer = _trainer(program, arguments, rows, held_out, measures, settings, callbacks, teacher)
        with nullcontext() if output_dir is None else saving_at_interrupt(trainer):
            result = _run(program, trainer, checkpoint, home, settings.trainer)
        refuse_diverged(program, settings.learning_rate)
        samples = _samples(program, held_out, tokenizer, settings) if result.is_main else ()
        told = metric.name if metric is not None and f"eval_{metric.name}" in result.metrics else None
        result = dataclasses.replace(result, rows_cut=rows.cut, samples=samples, metric=told)
        program.outlive_training()
        program.trained = result.to_json()
        return result


def _prepared(
    program: Program, data: Any, eval_data: Any, tokenizer: Any, settings: TrainOptions, collator: Any
) -> tuple[Prepared, Prepared | None]:
    """The rows to learn from, and those to evaluate on, if there are any."""
    rows = prepare(data, program, tokenizer, settings, collator=collator)
    warn_of_one_class(program, rows)
    if eval_data is None:
        return rows, None
    return rows, prepare(eval_data, program, tokenizer, settings, collator=collator, like=rows)


def _samples(
    program: Program, held_out: Prepared | None, tokenizer: Any, settings: TrainOptions
) -> tuple[dict[str, str], ...]:
    """What the trained model makes of some evaluation rows, where that was asked for."""
    if held_out is None or not settings.samples:
        return ()
    return tuple(samples_of(program, held_out, tokenizer, settings.samples))


def _metric(program: Program, held_out: Prepared | None, own: Callable[[Any], Any] | None) -> Metric | None:
    """What an evaluation measures: nothing of ours where the caller does."""
    if own is not None:
        if held_out is None:
            raise UsageError("compute_metrics measures evaluation data; give eval_data, or leave it out")
        return None
    measured = held_out.metric if held_out is not None else None
    return measured or metric_of(program)


def _check(program: Program, settings: TrainOptions, eval_data: Any, output_dir: Any, resume: Any) -> None:
    if program.device.type == "meta":
        raise UsageError(f"{program.name} was captured without weights; capture it with meta=False to train it")
    if program.stage == "eval":
        raise UsageError(f"{program.name} was made ready for evaluation (folded, say); train it before that")
    if not program.trainable():
        raise UsageError(f"{program.name} has nothing to train; rewrite it with a method, such as lora")
    if settings.keep_best and (eval_data is None or not settings.evaluate):
        raise UsageError("keep_best needs evaluation data to choose by; give eval_data (--eval) and leave evaluate on")
    if settings.samples and (eval_data is None or loss_type(program.source.model) != "ForCausalLM"):
        raise UsageError("samples need a causal model and evaluation data (eval_data, --eval); leave samples out")
    if output_dir is None and resume is True:
        raise UsageError("resume needs output_dir, the folder of the checkpoints")
    if output_dir is None and saves(settings) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes share their checkpoints; give output_dir")


def _teacher(program: Program, settings: TrainOptions, teacher: Program | None) -> Program | None:
    """Whom the program learns from, if it does."""
    if not (settings.distill or settings.distill_hidden):
        if teacher is not None:
            raise UsageError("a teacher teaches by distill or distill_hidden; give one of them, or no teacher")
        return None
    if teacher is not None:
        return teacher
    random = program.untrained()
    if random and settings.distill:
        raise UsageError(
            f"{program.name}: {random[0]} was drawn at random and not trained, so the program has no answers to learn; "
            "train it without distill first, or give a teacher"
        )
    return program.copy()


def _trainer(
    program: Program,
    arguments: TrainingArguments,
    rows: Prepared,
    held_out: Prepared | None,
    measures: Mapping[str, Any],
    settings: TrainOptions,
    callbacks: Sequence[TrainerCallback],
    teacher: Program | None,
) -> Trainer:
    for name in program.names("unread"):
        # The graph does not read them, so they get no gradient, and DDP would wait for it.
        get_tensor(program.root, name).requires_grad_(False)
    model = build_module(program)
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    if teacher is not None:
        model.learn_from(teacher, settings.distill, settings.distill_temperature, settings.distill_hidden)
    trainer = Trainer(
        model,
        arguments,
        data_collator=rows.collator or Collator(default_data_collator),
        train_dataset=rows.rows,
        eval_dataset=None if held_out is None else held_out.rows,
        callbacks=[*callbacks, StopDiverged()],
        **measures,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress)
    return trainer


def _run(
    program: Program, trainer: Trainer, checkpoint: str | None, home: torch.device, given: Mapping[str, Any]
) -> TrainResult:
    teaching = rewritten_model(trainer.model).teaching
    # A teacher follows the first batch that it is asked about.
    teachers = [(teaching.teacher, teaching.teacher.program.device)] if teaching is not None else []
    started = time.perf_counter()
    output = _trained(trainer, checkpoint, given)
    trainer.accelerator.wait_for_everyone()  # before the first process may remove what another still reads
    seconds = time.perf_counter() - started
    final = trainer.evaluate() if trainer.concluded and trainer.eval_dataset is not None else None
    _bring_home(program, rewritten_model(trainer.model), home)
    for teacher, desk in teachers:
        teacher.to(desk)
    state = trainer.state
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    metrics = {"train_loss": output.training_loss, "steps": state.global_step, "epochs": float(state.epoch or 0)}
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry and best in (None, entry["step"])]
    last = final or (evaluations[-1] if evaluations else {})
    metrics.update({name: value for name, value in last.items() if name.startswith("eval_") and name not in _TIMES})
    rows, passes = trainer.eval_dataset, tuple(applied.step.pass_name() for applied in program.history)
    of_what = {"passes": passes, "evaluated": rows.digest if isinstance(rows, Rows) else None}
    return TrainResult(metrics, tuple(state.log_history), seconds, best, trainer.is_world_process_zero(), **of_what)


def _trained(trainer: Trainer, checkpoint: str | None, given: Mapping[str, Any]) -> Any:
    """What HF Trainer makes of it; UsageError for arguments ``given`` to it that it stumbles over as it begins."""
    try:
        return trainer.train(resume_from_checkpoint=checkpoint)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        if trainer.state.global_step or not given:
            raise
        raise UsageError(f"HF Trainer cannot train with trainer = {dict(given)}: {first_line(error)}") from error


#: What HF Trainer says of an evaluation that is no figure of the model.
_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


def _bring_home(program: Program, model: RewrittenModel, home: torch.device) -> None:
    """Let the program hold what was trained, on the device it was on."""
    if model.units is not None:
        model.gather()
        return
    model.to(home)
    # Moving a module replaces its buffers. Those of the top are its own; the others it shares with the program.
    for name, value in model.named_buffers(recurse=False):
        if has_tensor(program.root, name):
            put_tensor(program.root, name, value, persistent(program.root, name))
