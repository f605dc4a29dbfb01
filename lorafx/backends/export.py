"""The back ends: ONNX, Hugging Face checkpoints and ``.pt2``.

Conversion belongs to `transformers.exporters`. It captures the model its own way for each back end (ONNX needs other
traces than training), so lorafx steps in between its capture and its conversion: the program's history is replayed on
that capture, which keeps all of the back end's fixes and fusions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import sys
from collections.abc import Mapping
from contextlib import contextmanager, redirect_stdout
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import fx, nn
from torch.export import ExportedProgram
from transformers.exporters.configs import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

from ..base import passes_of
from ..errors import CaptureError, ParityError, UsageError
from ..files.folder import new_folder
from ..formats.companions import copy_companions
from ..formats.hf import hf_model
from ..formats.peft import adapter_config, adapter_keys
from ..formats.peft_reader import opened_adapter
from ..formats.run import VALUES, base_record, plain_tensor
from ..frontend.capture import program_from
from ..frontend.trace import gradients_on, trace_with
from ..graph.precision import coarsest
from ..graph.program import Source, structure
from ..graph.tree import get_tensor, has_tensor, named_tensors, put_tensor
from ..models.intact import intact
from ..models.tokenizers import length_limit
from ..parity.answers import Comparison
from ..parity.runner import Runner
from ..pipeline import fold, run, to_eval
from ..proof.exported import check_cache
from ..proof.exports import held_against, parity_record, reference_of, refuse_untrained, unproven
from ..proof.open import open_runner
from ..public import Program
from ..reporting.report import shrunk_blocks
from ..reporting.sizes import chart
from ..version import __version__
from .onnx_kernels import unfuse_batch_transposes, unfuse_skip_norms
from .onnx_ranges import hold_ranges
from .plain_lora import as_lora

_log = logging.getLogger(__name__)

Format = Literal["onnx", "hf", "pt2", "peft"]
FORMATS = ("onnx", "hf", "pt2", "peft")
PROVIDERS = ("cpu", "cuda")


def export(
    program: Program,
    path: str | PathLike[str],
    format: Format = "onnx",  # noqa: A002 - the word users expect
    *,
    provider: Literal["cpu", "cuda"] = "cpu",
    adapters: Literal["merged", "separate"] = "merged",
    dtype: torch.dtype | None = None,
    generate: bool = False,
    check: bool = True,
    overwrite: bool = False,
    made_from: Mapping[str, str] | None = None,
) -> Comparison | None:
    """Write a program as a folder that runs elsewhere.

    Args:
        program: rewritten or folded; merged adapters are folded here if they are not yet
        path: the folder to make; refused if it exists, unless ``overwrite``
        format: ``onnx`` (opens with ``ExportedModel.from_pretrained``), ``hf`` (an ordinary checkpoint),
            ``pt2`` (``ExportedModel`` over ``torch.export``), ``peft`` (a LoRA adapter for PEFT, of a program that is
            not folded: gates and tied scalings become part of A and B, closed ranks are left out)
        provider: the ONNX Runtime provider whose fused operators are used, and for which a program is folded that is
            not folded yet
        adapters: ``merged`` into the base weights, or ``separate`` operators as they were trained
        dtype: convert weights and activations to this dtype; folding happens before, so weights round once
        generate: export prefill and decode graphs with a cache, for causal language models
        check: hold the passes of folding to their promises, and compare what was written with the trained program (the
            one ``program`` was folded from) on the same inputs before the folder gets its name
        made_from: what the manifest is to say of the inputs; see :func:`lorafx.commands.job.run_job`

    Returns:
        the comparison; None without ``check``, and with ``generate``, whose graphs cannot be compared yet: the log and
        the folder's report say so

    Raises:
        UsageError: an unknown format, a format that cannot hold this program, or values that are random because
            nothing was trained
        ParityError: the written model does not compute the program's function; nothing is left behind
    """
    if format not in FORMATS or provider not in PROVIDERS:
        raise UsageError(f"cannot export to {format!r} for {provider!r}; formats: {FORMATS}, providers: {PROVIDERS}")
    if program.device.type == "meta":
        raise UsageError("the program was captured on the meta device and has no weights; capture or load it with them")
    reference, reason = reference_of(program), unproven(check, generate)
    if check:
        refuse_untrained(reference)
    final = _adapter(program) if format == "peft" else _final(program, adapters, format, provider, check)
    meta = {"base": base_record(final), "history": _history_record(final), "provider": provider, "adapters": adapters}
    if made_from is not None:
        meta["made_from"] = dict(made_from)
    with new_folder(path, kind=format, meta=meta, overwrite=overwrite) as folder:
        if format == "hf":
            _write_hf(final, folder, dtype)
        elif format == "peft":
            _write_adapter(final, folder, dtype)
        else:
            _write_exported(final, folder, format, provider, dtype, generate)
        copy_companions(final, folder)
        trusted = bool(final.source.options.get("trust_remote_code"))
        written = None if reason else _written(final, folder, format, dtype)
        result = None if written is None else held_against(reference, written, trust_remote_code=trusted)
        if result is not None and not result.ok:
            raise ParityError(f"{format} export differs from the program: {result.summary}")
        if reason:
            _log.warning("%s: %s", path, reason)
        _write_report(final, folder, parity_record(result, reason))
        return result


def _written(program: Program, folder: Path, kind: str, dtype: torch.dtype | None) -> Runner:
    """What was written, as others read it."""
    if kind == "peft":
        runner = open_runner(opened_adapter(program, folder))
        # PEFT computes in the base's dtype, with values that were rounded to this one.
        return runner if dtype is None else dataclasses.replace(runner, dtype=coarsest((runner.dtype, dtype)))
    # It is trusted as the program is.
    return open_runner(folder, sealed=False, trust_remote_code=True)


def _adapter(program: Program) -> Program:
    """The program as plain LoRA: itself, if it is that."""
    return program if program.origin is None and adapter_config(program)[0] is not None else as_lora(program)


def _final(program: Program, adapters: str, kind: str, provider: Literal["cpu", "cuda"], check: bool) -> Program:
    if adapters == "separate":
        if program.origin is not None:
            raise UsageError("this program is folded: its adapters are merged; export the program before fold()")
        return to_eval(program)
    # A checkpoint's architecture has no gathers.
    gather = "never" if kind == "hf" else "auto"
    folded = program if program.origin is not None else fold(program, provider=provider, gather=gather, check=check)
    left = folded.names("adapter", "gate")
    if left:
        raise UsageError(f"{left[0]} cannot be merged into the base; export with adapters='separate'")
    return folded


def _write_report(program: Program, folder: Path, parity: Mapping[str, Any]) -> None:
    """What happened, beside the model; with a chart when channels were removed."""
    report = program.report.plus(parity=parity)
    (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    rows = shrunk_blocks(program)
    if rows:
        (folder / "blocks.svg").write_text(chart(rows), encoding="utf-8")


def _history_record(program: Program) -> list[dict[str, Any]]:
    from ..recipes.recipe import pass_dict

    return [pass_dict(step) for step in passes_of(program)]


# ---- Hugging Face checkpoint


def _write_hf(program: Program, folder: Path, dtype: torch.dtype | None) -> None:
    model: Any = hf_model(program)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)


def _write_adapter(program: Program, folder: Path, dtype: torch.dtype | None) -> None:
    """The two files of a PEFT adapter; UsageError when PEFT cannot compute this program's function."""
    config, reason = adapter_config(program)
    if config is None:
        raise UsageError(f"PEFT cannot hold this program: {reason}")
    keys = adapter_keys(program)
    values = {keys[name]: plain_tensor(value.to(dtype or value.dtype)) for name, value in program.learned().items()}
    save_file(values, folder / VALUES, metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- transformers.exporters


class RewritingExporter(DynamoExporter):
    """A :class:`DynamoExporter` that replays a program's history between capture and conversion.

    Combine it with a back end by cooperative inheritance: ``class X(OnnxExporter, RewritingExporter)`` — the back end's
    own ``export_program`` then calls this one where it would have called the plain capture.
    """

    def __init__(self, program: Program):
        super().__init__()
        self.rewritten = program

    def export_program(self, model: Any, sample_inputs: Any, config: Any) -> tuple[ExportedProgram, Any]:
        """Capture ``model`` (the program's source, or a component of it) and rewrite the capture."""
        with gradients_on(True):  # as the program was captured, so that both have the same weights to rewrite
            captured, metadata = super().export_program(model, sample_inputs, config)
        return self._rewrite(captured, model, sample_inputs, config), metadata

    def _rewrite(self, captured: ExportedProgram, model: nn.Module, inputs: Any, config: Any) -> ExportedProgram:
        root = self.rewritten.source.model
        names = {id(value): name for name, value in named_tensors(root)}
        if only_values_differ(self.rewritten):
            local = {names.get(id(value), name): name for name, value in named_tensors(model)}
            return _with_values(captured, self.rewritten, local)
        base = program_from(captured, Source(model), inputs, names)
        base.source, base.heads = self.rewritten.source, self.rewritten.heads
        replayed = replay(self.rewritten, base, whole=model is root)
        unlifted: Any = captured.module(check_guards=False)
        module = fx.GraphModule(replayed.root, replayed.graph)
        module.graph.set_codegen(unlifted.graph._codegen)
        module.recompile()
        return torch.export.export(module, (), dict(inputs), dynamic_shapes=config.dynamic_shapes)


# The back end's methods stand for their base's, over another kind of program: that is how transformers declares them.
class RewritingOnnxExporter(OnnxExporter, RewritingExporter):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' ONNX exporter over the rewritten graph: its patches before, its conversion and fusions after."""


def replay(program: Program, base: Program, *, whole: bool = True) -> Program:
    """Apply ``program``'s history to ``base``, another capture of the same model, and give it ``program``'s values.

    What came after training (folding, removing dead channels) runs on the trained values, since they decide what it
    does. ``whole`` says that ``base`` is the whole model, not a component of it. Raises CaptureError when a pass then
    inserts other tensors than it did in ``program``, or leaves others behind.
    """
    trained = program.origin or program
    steps = passes_of(program)
    result = run(base, steps[: len(trained.history)], check=False)
    for applied, again in zip(trained.history, result.history, strict=True):
        ours = {name for inserted in applied.inserted for name in inserted.tensors.values()}
        theirs = {name for inserted in again.inserted for name in inserted.tensors.values()}
        if theirs - ours or (whole and ours - theirs):
            odd = sorted(ours ^ theirs)[0]
            raise CaptureError(f"{applied.step.pass_name()}: {odd} is not in both captures of {program.name}")
    _take_values(result, trained)
    if program is not trained:
        result = run(result, steps[len(trained.history) :], check=False)
        _take_values(result, program)
    return result


def _take_values(result: Program, program: Program) -> None:
    """Give ``result`` the values ``program`` has under the same names; CaptureError where their shapes differ."""
    constants = set(program.names("constant"))
    for name, value in named_tensors(program.root):
        if name in constants or not has_tensor(result.root, name):
            continue
        slot = get_tensor(result.root, name)
        if slot.shape != value.shape:
            shapes = f"{tuple(slot.shape)} and {tuple(value.shape)}"
            raise CaptureError(f"{name} has two shapes, {shapes}, in two captures of {program.name}; export it as pt2")
        put_tensor(result.root, name, _cast(value, slot))


def _cast(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.dtype == like.dtype or not value.is_floating_point():
        return value
    cast = value.detach().to(like.dtype)
    return nn.Parameter(cast, requires_grad=False) if isinstance(value, nn.Parameter) else cast


def only_values_differ(program: Program) -> bool:
    """Whether ``program`` computes what was captured with other values in its tensors, as after merging adapters."""
    if program.captured is None or program.config_changes:
        return False
    return structure(program.graph) == structure(to_eval(program.captured).graph)


def _with_values(captured: ExportedProgram, program: Program, local: Mapping[str, str]) -> ExportedProgram:
    """The capture with the program's values; it needs no second trace."""
    shared: dict[int, torch.Tensor] = {}
    for name, value in named_tensors(program.root):
        slot = captured.state_dict.get(local.get(name, name))
        if slot is not None:
            captured.state_dict[local.get(name, name)] = shared.setdefault(id(value), _cast(value, slot))
    return captured


@contextmanager
def _exportable(program: Program, dtype: torch.dtype | None):
    """The eager model in evaluation mode (a converted copy when another dtype is asked for), put back afterwards."""
    model = program.source.model
    if dtype is not None:
        yield copy.deepcopy(model).to(dtype).eval()
        return
    with intact(model):
        yield model.eval()


def _write_exported(
    program: Program, folder: Path, kind: str, provider: str, dtype: torch.dtype | None, generate: bool
) -> None:
    exported = converted(program, kind, provider, dtype, generate)
    if kind == "onnx":
        check_cache(exported)
        record = {"lorafx_version": __version__, "lorafx_history": json.dumps(_history_record(program))}
        record["lorafx_base"] = json.dumps(base_record(program))
        for component in exported.components.values():
            component.program.metadata_props.update(record)
            unfuse_batch_transposes(component.program)
            if not generate:
                hold_ranges(component.program, program.signature.domain, length_limit(program.config))
            if provider == "cpu":
                unfuse_skip_norms(component.program)
    for key, value in program.config_changes.items():
        exported.config = copy.deepcopy(exported.config)
        setattr(exported.config, key, value)
    exported.save_pretrained(folder)


def converted(
    program: Program, kind: str, provider: str = "cpu", dtype: torch.dtype | None = None, generate: bool = False
) -> Any:
    """A folded (or evaluation-form) program as transformers' ``ExportedModel``, not written yet; see :func:`export`."""
    # The converter prints its progress to stdout, which is kept for results.
    with redirect_stdout(sys.stderr), _exportable(program, dtype) as model:
        target = dataclasses.replace(program, source=dataclasses.replace(program.source, model=model))

        def attempt(shapes: Any) -> Any:
            exporter, config = _back_end(target, kind, provider, shapes, free=generate or shapes is not None)
            if generate:
                return exporter.export_for_generation(model, dict(program.example), config)
            return exporter.export(model, dict(program.example), config)

        shapes = program.signature.domain.dynamic_shapes(program.example)
        return trace_with(attempt, model, None if generate else shapes)


def _back_end(program: Program, kind: str, provider: str, shapes: Any, *, free: bool) -> tuple[Any, Any]:
    if kind == "onnx":
        config = OnnxConfig(dynamic=free, dynamic_shapes=shapes, ort_fusions=cast(Any, provider))
        return RewritingOnnxExporter(program), config
    return RewritingExporter(program), DynamoConfig(dynamic=free, dynamic_shapes=shapes)
