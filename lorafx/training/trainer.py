"""transformers' Trainer for rewritten models: the methods' penalty and steps, and small checkpoints."""

from __future__ import annotations

import json
import logging
import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback

from ..errors import ArtifactError, UsageError
from ..graph.tree import get_tensor
from ..models.checkpoint import check_safetensors
from .module import RewrittenModel
from .sharding import Block, assign, shard_again, split_state, whole, whole_state

_log = logging.getLogger(__name__)

# The mixin's methods call the Trainer that follows it in the order of classes.
_TrainerBase = transformers.Trainer if TYPE_CHECKING else object

#: What a checkpoint keeps of the model: the tensors the base does not hold, and the clock.
STATE = "adapter_model.safetensors"
_TRAINER_STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.pt"
_SCHEDULER = "scheduler.pt"
#: The clock's name there.
_CLOCK = "clock"


# ---- the state of a training


def rewritten_model(model: Any) -> RewrittenModel:
    """The module of a program inside ``model``, however it is wrapped: DDP, ``torch.compile``, a module around it."""
    inner = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in inner if isinstance(module, RewrittenModel)), None)
    if found is None:
        raise UsageError(f"{type(model).__name__} holds no rewritten model; train what program.module() returns")
    return found


def state_of(model: RewrittenModel) -> dict[str, Tensor]:
    """What training changes, by name, copied to the CPU: adapters, gates, statistics, trained weights, the clock.

    Of a model that is split over processes, whole tensors; every process has to call it.
    """
    shard_again(model)
    held = {name: get_tensor(model, name).detach() for name in model.program.learned()}
    held[_CLOCK] = model.clock
    return {name: whole(value).to("cpu", copy=True).contiguous() for name, value in held.items()}


def load_state(model: RewrittenModel, folder: str | PathLike[str]) -> None:
    """Take over what a checkpoint folder keeps. ArtifactError when it is broken or belongs to another program."""
    file = Path(folder) / STATE
    if not file.is_file():
        raise ArtifactError(f"{folder}: no {STATE}; not a checkpoint of lorafx")
    check_safetensors(file)
    values = load_file(file)
    expected = state_of(model)
    for name in sorted({*expected, *values}):
        here, there = (tuple(held[name].shape) if name in held else "missing" for held in (expected, values))
        if here != there:
            raise ArtifactError(f"{file}: made by another recipe: it has {name} as {there}, this program as {here}")
    for name, value in values.items():
        assign(model.clock if name == _CLOCK else get_tensor(model, name), value)


def last_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """The newest whole checkpoint in the output folder of a training, or None. Half-written ones are passed over."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    whole = [path for path in found if not checkpoint_flaw(path)]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def checkpoint_flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when it is whole. The Trainer's state is written last."""
    for name in (STATE, _OPTIMIZER, _TRAINER_STATE):
        if not (folder / name).is_file():
            return f"no {name}"
    try:
        check_safetensors(folder / STATE)
        json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (ArtifactError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return str(error)
    return None


# ---- HF Trainer


class LorafxCallback(TrainerCallback):
    """Tells the methods of a rewritten model about every optimiser step.

    On its own it is enough for a Trainer whose loss is the model's own, or includes ``model.penalty()``;
    :class:`MethodTrainerMixin` includes it. A training that stops before its last step, or ends with the weights
    of an earlier one, has its schedules brought to their end; ``concluded`` says whether that changed anything.
    """

    def __init__(self) -> None:
        self.concluded = False
        self._asked_to_stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.fp16 and args.max_grad_norm == 0:
            raise UsageError("fp16 without clipping shows the methods scaled gradients; set max_grad_norm, or use bf16")
        inner = rewritten_model(model)
        inner.total_steps = state.max_steps
        if state.global_step == 0 or int(inner.clock) == 0:  # else the clock came with the checkpoint
            inner.clock.fill_(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        rewritten_model(model).before_step()

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not getattr(optimizer, "step_was_skipped", False):  # fp16 skips steps whose gradients overflowed
            rewritten_model(model).after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._asked_to_stop = control.should_training_stop

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # A stop because of an evaluation needs weights that could be kept; other stops are left alone.
        if control.should_training_stop and not self._asked_to_stop:
            control.should_training_stop = rewritten_model(model).settled()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        inner = rewritten_model(model)
        if int(inner.clock) < state.max_steps:
            before = state_of(inner)
            inner.conclude()
            after = state_of(inner)
            self.concluded = any(not torch.equal(before[name], value) for name, value in after.items())
            return
        for name in inner.unsettled():
            far = f"{name} did not get to what it was asked for in {state.global_step} steps"
            _log.warning("%s; its report says how far: train longer, or raise its rates", far)


class MethodTrainerMixin(_TrainerBase):
    """What a transformers Trainer needs to train a rewritten model: ``class MyTrainer(MethodTrainerMixin, Trainer)``.

    Adds the methods' penalty to the training loss, calls them around the optimiser's step, gives gates the learning
    rate a method asks for and keeps weight decay off them, and writes checkpoints of what is learned alone, from which
    training resumes bit by bit. The best checkpoint is chosen among those taken after all schedules ended.
    """

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any):
        config: Any = getattr(model, "config", None)
        use_cache = getattr(config, "use_cache", None)
        if args is not None and args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, *rest, **kwargs)
        if use_cache is not None:
            # The Trainer turns it off, and the config would carry that into the folded checkpoint.
            config.use_cache = use_cache
        rewritten_model(self.model)
        self._prepare_sharding()
        self._telling = LorafxCallback()
        self.add_callback(self._telling)
        self._last_penalty: Tensor | None = None

    def _prepare_sharding(self) -> None:
        """Let FSDP2 split the model a block at a time, if it is switched on; UsageError for settings that would be
        wrong."""
        if self.is_deepspeed_enabled:
            raise UsageError("DeepSpeed splits tensors that methods need whole; train with DDP (torchrun) or FSDP2")
        if not self.is_fsdp_enabled:
            if self.args.fsdp and self.args.world_size > 1:
                raise UsageError(f"accelerate shards nothing on {self.args.device.type}; leave fsdp out, which is DDP")
            return
        plugin: Any = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UsageError("FSDP1 flattens tensors that methods need one by one; set version = 2 in fsdp_config")
        if plugin.cpu_ram_efficient_loading:
            raise UsageError("every process holds the program already; leave cpu_ram_efficient_loading out")
        model = rewritten_model(self.model)
        model.blocks()
        vars(model).update(_no_split_modules=[Block.__name__] if model.units else [])
        if plugin.activation_checkpointing:  # its wrappers would stand between a block and its tensors' names
            plugin.activation_checkpointing = False
            model.gradient_checkpointing_enable()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss; while training with the penalty, which counts once an optimiser step."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return result
        inner = rewritten_model(model)
        penalty = inner.penalty()  # None when the loss is the model's own
        self._last_penalty = inner.duties.carried if penalty is None else penalty.detach()
        if penalty is None:
            return result
        loss = (result[0] if return_outputs else result) + penalty * self._share(num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def _share(self, num_items_in_batch: Any) -> float:
        """The part of the penalty that one micro-batch adds to a loss that is not the model's own.

        A loss normalised over the whole accumulated batch is summed over micro-batches as it is, so each adds its part;
        any other loss is divided by their number afterwards, the penalty with it.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        steps = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        return 1 / steps if scaled else 1.0

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation while training; the one before the first step takes no random numbers from training."""
        if self.state.global_step:
            return super()._evaluate(*args, **kwargs)
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            return super()._evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the penalty beside the loss that contains it."""
        if "loss" in logs and self._last_penalty is not None:
            logs["penalty"] = float(self._last_penalty)
        super().log(logs, *args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters weight decay acts on: not gates, which it would pull towards their threshold."""
        roles = rewritten_model(model).program.roles
        return [name for name in super().get_decay_parameter_names(model) if roles.get(name) != "gate"]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' optimiser, with groups of their own for parameters that a method sets apart."""
        given = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if given:
            return optimizer
        model = rewritten_model(self.model)
        apart = {id(get_tensor(model, name)): chosen for name, chosen in model.parameter_settings().items()}
        for group in list(optimizer.param_groups):
            moved: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for value in group["params"]:
                if id(value) in apart:
                    moved.setdefault(tuple(sorted(apart[id(value)].items())), []).append(value)
            group["params"] = [value for value in group["params"] if id(value) not in apart]
            for chosen, values in moved.items():
                optimizer.add_param_group({**group, **dict(chosen), "params": values})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What is learned, as :meth:`_save` writes it; what is split over processes is gathered by all of them."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        return self._save(output_dir, state_of(rewritten_model(self.model)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = whole_state(optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / _OPTIMIZER)
            torch.save(scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        state = torch.load(Path(checkpoint) / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(split_state(state, optimizer.param_groups))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        values = state_dict if self.is_fsdp_enabled else state_of(rewritten_model(self.model))
        save_file(values, folder / STATE, metadata={"format": "pt"})
        tokenizer: Any = self.processing_class
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_state(rewritten_model(model or self.model), resume_from_checkpoint)

    @property
    def concluded(self) -> bool:
        """Whether the weights the training ended with were brought to the methods' end after their last evaluation."""
        return self._telling.concluded

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Early in a schedule a model scores better, but does not yet keep the method's promise.
        return rewritten_model(self.model).settled() and super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        load_state(rewritten_model(self.model), str(self.state.best_model_checkpoint))


class Trainer(MethodTrainerMixin, transformers.Trainer):
    """transformers' Trainer for what ``program.module()`` returns. It takes the same arguments."""


class Progress(ProgressCallback):
    """transformers' progress bar with its log lines on stderr, where the bar is; stdout is for results."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {key: value for key, value in logs.items() if key != "total_flos"}
            figures = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            self.training_bar.write(f"step {state.global_step}  {figures}", file=sys.stderr)
