"""The back ends: ONNX, Hugging Face checkpoints and ``.pt2``.

Conversion belongs to `transformers.exporters`, between whose capture and conversion a program's history is replayed
(``replay``); here it is decided what is written, and held against the program before the folder gets its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..deferred.programs import is_deferring, resident
from ..errors import ParityError, UsageError
from ..files.folder import FileEntry, new_folder
from ..formats.companions import copy_companions
from ..formats.peft import adapter_config
from ..formats.peft_reader import opened_adapter
from ..formats.run import base_record
from ..graph.precision import coarsest
from ..graph.tree import named_tensors, tensor_hash
from ..parity.comparison import Comparison
from ..parity.runner import PROVIDERS, Runner
from ..pipeline import fold, to_eval
from ..proof.certificate import write_certificate
from ..proof.checkpoint import Check, hold_checkpoint, proof_of_files, refuse_check
from ..proof.exports import held_against, parity_record, reference_of, refuse_untrained, unproven
from ..proof.open import open_runner
from ..proof.requantised import requantised
from ..proof.scores import refuse_unscored
from ..proof.tensors import TensorProof
from ..proof.ties import chosen_among_equals
from ..public import Program
from ..reporting.report import write_report
from ..version import __version__
from .plain_lora import as_lora
from .quantized import approximate, check_quantized, quantized
from .writing import history_record, write_hf, write_other

_log = logging.getLogger(__name__)

Format = Literal["onnx", "hf", "layered", "pt2", "peft", "onnx-adapter"]
FORMATS = get_args(Format)


def export(
    program: Program,
    path: str | PathLike[str],
    format: Format = "onnx",  # noqa: A002 - the word users expect
    *,
    provider: Literal["cpu", "cuda"] = "cpu",
    adapters: Literal["merged", "separate", "slots"] = "merged",
    targets: str | Sequence[str] = "all-linear",
    slots: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    generate: bool = False,
    quantize: Literal["int8", "int4"] | None = None,
    data: Any = None,
    data_options: Mapping[str, Any] | None = None,
    check: bool | Check = True,
    overwrite: bool = False,
    made_from: Mapping[str, str] | None = None,
) -> Comparison | None:
    """Write a program as a folder that runs elsewhere.

    Args:
        program: rewritten or folded; merged adapters are folded here if they are not yet
        path: the folder to make; refused if it exists, unless ``overwrite``
        format: ``onnx`` (opens with ``ExportedModel.from_pretrained``), ``hf`` (an ordinary checkpoint), ``layered``
            (one whose config says widths by layer, ``per_layer_config``: lorafx opens it, transformers does once the
            model's class reads that), ``pt2`` (``ExportedModel`` over ``torch.export``), ``peft`` (a LoRA adapter for
            PEFT, of a program that is not folded: gates and tied scalings become part of A and B, closed ranks are
            left out), ``onnx-adapter`` (the same update as a file that ONNX Runtime puts into the slots of its base at
            run time)
        provider: the ONNX Runtime provider whose fused operators are used, and for which a program is folded that is
            not folded yet
        adapters: ``merged`` into the base weights, ``separate`` operators as they were trained, or ``slots``: the base
            in ONNX with inputs that take any adapter at run time, of rank 0 unless given (:mod:`lorafx.backends.slots`)
        targets: of ``slots``, the weights that have one; a classification head has one anyway
        slots: of an ``onnx-adapter``, the folder with the base that has the slots
        dtype: convert weights and activations to this dtype; folding happens before, so weights round once. A graph
            of a program in bfloat16 is in float32 unless this says otherwise: ONNX Runtime has no bfloat16 on the CPU
        generate: one graph with a cache, for causal language models, in the folder that onnxruntime-genai and
            transformers.js read (:mod:`lorafx.backends.decoder`), or for encoder-decoders of text or sound the two
            graphs that transformers.js reads (:mod:`lorafx.backends.encoder_decoder`); what it generates is compared,
            token for token
        quantize: put a graph of fewer bits in the place of the one that was compared, by ONNX Runtime's own tools; the
            report says what both score and weigh (:mod:`lorafx.backends.quantized`)
        data: a table to score both on; their own examples when None
        data_options: how to read it, by the names of training options (``text``, ``label``, ``max_length``, …)
        check: hold the passes of folding to their promises, and compare what was written with the trained program (the
            one ``program`` was folded from) on the same inputs before the folder gets its name. Of a checkpoint:
            ``tensors``, each weight with what its operators compute; ``blocks``, each of them on the values that reach
            it, and the tensors; ``full``, the whole function. True is ``blocks`` for weights that were computed as they
            were written, else ``full``
        made_from: what the manifest is to say of the inputs; see :func:`lorafx.commands.job.run_job`

    Returns:
        the comparison, of what a quantised graph was before; None without ``check``: the log and the folder's report
        say so

    Raises:
        UsageError: an unknown format, a format that cannot hold this program, or values that are random because
            nothing was trained
        ParityError: the written model does not compute the program's function; nothing is left behind
    """
    _check(program, format, provider, "all-linear" if adapters == "slots" else targets)
    dtype = _computable(program, format, provider, dtype)
    if generate:
        from .decoder import check_generates

        check_generates(program, format, dtype, adapters)
    layered = format == "layered"
    if layered:  # else it is a checkpoint like any other
        format = "hf"  # noqa: A001
    check_quantized(quantize, data, format, provider, dtype, adapters, generate=generate)
    refuse_unscored(program, data)
    if adapters == "slots" or slots is not None or format == "onnx-adapter":
        from .slots import check_slots

        check_slots(program, format, adapters, slots)
    refuse_check(check, format, dtype)
    reference, reason = reference_of(program), unproven(bool(check))
    if check and adapters != "slots":  # a head that no file holds is a slot without values
        refuse_untrained(reference)
    final = _unfolded(program, format) or _final(program, adapters, format, provider, bool(check))
    pair = generate and getattr(final.config, "is_encoder_decoder", False)
    final = final if writes_tiles(format, adapters, quantize, generate=generate) and not pair else resident(final)
    said = {"quantized": quantize, "made_from": made_from and dict(made_from)}
    meta: dict[str, Any] = {"base": base_record(final), "history": history_record(final)}
    meta |= {"provider": provider, "adapters": adapters, **{key: value for key, value in said.items() if value}}
    hashed: dict[str, FileEntry] = {}
    resume = _digest(meta, reference, dtype) if format == "hf" and is_deferring(final) else ""
    slotted = slots or (targets if adapters == "slots" else None)
    how = _How(format, layered, provider, dtype, generate, slotted, slots, quantize, data, data_options, check, reason)
    with new_folder(path, kind=format, meta=meta, overwrite=overwrite, known=hashed, resume=resume) as folder:
        return _filled(folder, Path(path), reference, final, how, hashed)


@dataclass(frozen=True)
class _How:
    """How a program is written: options of :func:`export`, once they are checked.

    Attributes:
        slotted: the targets of slots, or the folder with the slots that an adapter is for
        slots: that folder
        reason: why nothing is compared; empty when it is
    """

    kind: str
    layered: bool
    provider: str
    dtype: torch.dtype | None
    generate: bool
    slotted: Any
    slots: str | PathLike[str] | None
    quantize: Literal["int8", "int4"] | None
    data: Any
    data_options: Mapping[str, Any] | None
    check: bool | Check
    reason: str


def _filled(
    folder: Path, path: Path, reference: Program, final: Program, how: _How, hashed: dict[str, FileEntry]
) -> Comparison | None:
    """Write ``final`` and all that goes with it into ``folder``, which is to become ``path``, and compare it with
    ``reference``. ``hashed`` gets the files that were hashed as they were written."""
    facts: Mapping[str, Any] = {}
    if how.kind == "hf":
        hashed.update(write_hf(final, folder, how.dtype, layered=how.layered))
    else:
        written_as = (how.provider, how.dtype, how.generate, how.slotted)
        facts = write_other(final, folder, how.kind, *written_as, joined=how.quantize is None)
    if how.kind != "onnx-adapter":
        copy_companions(final, folder)
    result, proof = (None, None) if how.reason else _compared(reference, final, folder, how)
    if result is None:
        _log.warning("%s: %s", path, how.reason)
    else:
        notes = [f"attention: {facts['attention']}"] if "attention" in facts else []
        # Not the folder it is written into until it is complete, nor where the writer keeps it.
        result = dataclasses.replace(result, b=path.resolve().name, notes=(*result.notes, *notes))
    few = None if how.quantize is None else quantized(final, folder, how.quantize, how.data, how.data_options)
    parity = approximate(parity_record(result, how.reason), few)
    write_report(final.report.plus(parity=parity, decoder=facts or None, quantized=few), folder)
    if how.kind not in ("peft", "onnx-adapter"):  # an adapter is not folded
        hashed.update(write_certificate(reference, final, folder, how.kind, hashed, parity, proof))
    return result


def writes_tiles(kind: str, adapters: str, quantize: str | None, *, generate: bool) -> bool:
    """Whether weights that are computed later can be written so, a tile at a time: those of a checkpoint, or of a graph
    that generates (:func:`export` computes those of two graphs before)."""
    merged = adapters == "merged" and quantize is None
    return kind in ("hf", "layered") or (kind == "onnx" and generate and merged)


def _check(program: Program, kind: str, provider: str, idle: str | Sequence[str]) -> None:
    """UsageError when a program cannot be written so, before any work; ``idle`` are targets that nothing reads."""
    if kind not in FORMATS or provider not in PROVIDERS:
        raise UsageError(f"cannot export to {kind!r} for {provider!r}; formats: {FORMATS}, providers: {(*PROVIDERS,)}")
    if program.device.type == "meta":
        raise UsageError("the program was captured on the meta device and has no weights; capture or load it with them")
    named = [idle] if isinstance(idle, str) else list(idle)
    if named != ["all-linear"]:
        raise UsageError(
            f"targets {', '.join(named)} are those of slots; export with adapters = slots, or leave them out"
        )


def _computable(program: Program, kind: str, provider: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype asked for, or float32 for what was in bfloat16; UsageError for bfloat16 where nothing computes it."""
    if kind != "onnx" or torch.bfloat16 not in (dtype, *(value.dtype for _, value in named_tensors(program.root))):
        return dtype
    if dtype is None:
        _log.warning("%s is in bfloat16, its graph in float32; another dtype is one to ask for", program.name)
        return torch.float32
    if dtype is torch.bfloat16 and provider == "cpu":
        raise UsageError("ONNX Runtime has no bfloat16 on the CPU; give --dtype float32 or float16, or --provider cuda")
    return dtype


def _compared(reference: Program, final: Program, folder: Path, how: _How) -> tuple[Comparison, TensorProof | None]:
    """What was written, compared with the trained program, and what is known about each tensor of a checkpoint.

    ParityError when it computes something else.
    """
    trusted, proof = bool(final.source.options.get("trust_remote_code")), None
    late = is_deferring(final)
    if how.kind == "hf" and (late or how.check in ("tensors", "blocks")):
        level = "blocks" if isinstance(how.check, bool) else how.check
        result, proof = hold_checkpoint(reference, final, folder, level, how.dtype, trust_remote_code=trusted)
    else:
        slots = how.slots or (folder if how.slotted is not None else None)
        written = _written(final if slots is None else reference, folder, how.kind, how.dtype, slots)
        result = held_against(reference, written, by_block=late, trust_remote_code=trusted)
    if not result.ok:
        why = chosen_among_equals(reference) if how.kind == "onnx" else ""
        said = why and f"; {why}: export it as hf or pt2"
        raise ParityError(f"{how.kind} export differs from the program: {result.summary}{said}")
    lost = requantised(final, folder) if how.kind == "hf" else None
    if lost is not None:
        _log.warning("%s: %s", final.source.path, lost)
        result = dataclasses.replace(result, notes=(*result.notes, lost))
    if proof is None and how.kind == "hf" and how.dtype is None:
        proof = proof_of_files(reference, final, folder, trust_remote_code=trusted)
    return result, proof


def _written(
    program: Program, folder: Path, kind: str, dtype: torch.dtype | None, slots: str | PathLike[str] | None
) -> Runner:
    """What was written, as others read it. ``slots`` is the folder that has the slots of it, or of its adapter."""
    if slots is not None:
        from ..formats.slots import read_slots
        from ..proof.slots import load_adapter, open_filled
        from .slots import slot_values

        if kind == "onnx-adapter":
            return open_filled(Path(slots), load_adapter(folder, Path(slots)))
        return open_filled(folder, values=slot_values(program, read_slots(folder), folder))
    if kind == "peft":
        runner = open_runner(opened_adapter(program, folder))
        # PEFT computes in the base's dtype, with values that were rounded to this one.
        return runner if dtype is None else dataclasses.replace(runner, dtype=coarsest((runner.dtype, dtype)))
    # It is trusted as the program is.
    return open_runner(folder, sealed=False, trust_remote_code=True, by_block=is_deferring(program))


def _digest(meta: Mapping[str, Any], reference: Program, dtype: torch.dtype | None) -> str:
    """What an export is made from: the base by its hashes, what was done to it, and what was learned."""
    learned = {name: tensor_hash(value) for name, value in reference.learned().items()}
    made_from = json.dumps([__version__, meta, learned, str(dtype)], sort_keys=True, default=str)
    return hashlib.sha256(made_from.encode()).hexdigest()[:16]


def _unfolded(program: Program, kind: str) -> Program | None:
    """The program that an adapter is written of: for PEFT one of plain LoRA, itself if it is that."""
    if kind != "peft":
        return program if kind == "onnx-adapter" else None
    return program if program.origin is None and adapter_config(program)[0] is not None else as_lora(program)


def _final(program: Program, adapters: str, kind: str, provider: Literal["cpu", "cuda"], check: bool) -> Program:
    if adapters in ("separate", "slots"):
        if program.origin is not None:
            raise UsageError("this program is folded: its adapters are merged; export the program before fold()")
        if adapters == "separate":
            return to_eval(program)
        from .slots import marked

        return marked(to_eval(program))
    # A checkpoint's architecture has no gathers.
    gather = "never" if kind == "hf" else "auto"
    folded = program if program.origin is not None else fold(program, provider=provider, gather=gather, check=check)
    left = folded.names("adapter", "gate")
    if left:
        raise UsageError(f"{left[0]} cannot be merged into the base; export with adapters='separate'")
    return folded
