"""The models of ``benchmarks.frontier``, made again from what their runs kept, as ONNX folders to time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import frontier_rows, frontier_show, mask_search, rivals
from benchmarks.frontier_rows import LORA, RECIPES, Recipe


def export(folder: Path, beside: Mapping[str, Path], row: str, budget: float, recipe: Recipe | None) -> None:
    """Write ``folder/onnx``: the folded model of the run in ``folder``.

    Of a run that kept its scores and not what it trained (as those of a lent machine), one of the same sizes with
    random weights, which takes as long.

    Args:
        folder: the run's
        beside: the folders of the runs it began with, by row
        row: its name
        budget: what it kept
        recipe: of a row that lorafx trained
    """
    import lorafx
    from lorafx.pipeline import merge

    if not trained(folder):
        folded = lorafx.fold(lorafx.capture(sized(frontier_show.read(folder / "score.json"))))
    elif recipe is not None:
        program = frontier_rows.kept_program(folder, recipe.passes(budget))
        folded = merge(program) if recipe.as_authors else lorafx.fold(program)
    else:
        folded = lorafx.fold(lorafx.capture(rival(folder, beside, row, budget)))
    lorafx.export(folded, folder / "onnx", overwrite=True)


def trained(folder: Path) -> bool:
    """Whether a run kept what it trained."""
    from lorafx.training.trainer import STATE

    return any((folder / name).exists() for name in (STATE, "adapter", "removed.json"))


def sized(told: Mapping[str, Any]) -> Any:
    """transformers' MiniLM with random weights, whose linear layers have the sizes that a run's scores tell."""
    from torch import nn

    left = told["left"] or masked_sizes(told["removed"])
    model = rivals.sequence_classifier(len({name.split(".layer.")[1].split(".")[0] for name in left}))
    if not left or left.keys() != {name for name, _ in rivals.linear(model)}:
        raise SystemExit("a sublayer is gone there; only a run that kept what it trained can be exported")
    for name, (outputs, inputs) in left.items():
        model.set_submodule(name, nn.Linear(inputs, outputs))
    return model.eval()


def masked_sizes(removed: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The sizes (out, in) that linear layers have without this many heads and neurons of each block, by module."""
    from torch import nn

    whole = rivals.sequence_classifier()
    width, sizes = rivals.layers_of(whole)[0].attention.self.attention_head_size, dict[str, tuple[int, int]]()
    for name, layer in rivals.linear(whole):
        assert isinstance(layer, nn.Linear)
        heads, neurons = removed[int(name.split(".layer.")[1].split(".")[0])]
        outputs, inputs = layer.out_features, layer.in_features
        if "attention" in name:
            gone = heads * width
            sizes[name] = (outputs, inputs - gone) if ".output." in name else (outputs - gone, inputs)
        else:
            sizes[name] = (outputs, inputs - neurons) if ".output." in name else (outputs - neurons, inputs)
    return sizes


def rival(folder: Path, beside: Mapping[str, Path], row: str, budget: float) -> Any:
    """transformers' model of a run that lorafx did not train."""
    if row == "mask-search":
        model = mask_search.merged(beside[LORA])
        mask_search.mask_out(model, removed(folder))
        mask_search.scale(model, json.loads((folder / "scales.json").read_text(encoding="utf-8")))
        return model
    if row == "first-layers":
        return rivals.with_adapter(rivals.sequence_classifier(rivals.layers_for(budget)), folder)
    model = rivals.started(beside[rivals.START])
    rivals.Groups(model).remove(removed(folder))
    return rivals.with_adapter(model, folder)


def removed(folder: Path) -> rivals.Chosen:
    """The heads and neurons that a run removed."""
    found = json.loads((folder / "removed.json").read_text(encoding="utf-8"))
    return {int(number): own for number, own in found.items()}


def theirs(folder: Path) -> Path:
    """What transformers exports of LoRA alone, merged, whose run is in ``folder``."""
    import lorafx
    from examples.demo import hugging_face_export

    made = folder / "theirs"
    if not (made / "model.onnx").is_file():
        merged = lorafx.fold(frontier_rows.kept_program(folder, RECIPES[LORA].passes(1.0)))
        lorafx.export(merged, folder / "checkpoint", "hf", overwrite=True)
        hugging_face_export(folder / "checkpoint", made)
    return made
