"""What the comparison of smaller models rests on: its folds, its recipes, its order of runs, the search of masks."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from benchmarks import folds, frontier, frontier_exports, frontier_rows, frontier_show, jobs, mask_search, rivals
from benchmarks.frontier_rows import LORA, RECIPES, variant
from lorafx.recipes.recipe import Recipe
from lorafx.reporting.sizes import flops_by_block, weights_by_block
from tests.small import bert_config, captured, words


def test_every_row_is_held_out_once() -> None:
    rows = [{"number": number} for number in range(23)]
    parts = [folds.held_out(rows, fold) for fold in range(folds.FOLDS)]
    assert sorted(row["number"] for _, test in parts for row in test) == list(range(23))
    for train, test in parts:
        assert sorted(row["number"] for row in (*train, *test)) == list(range(23))


def test_texts_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [folds._row([101, 60000, 102], 1), folds._row([101, 102], 0)]
    asked = []
    monkeypatch.setattr(folds, "tokenised", lambda texts: asked.append(texts) or rows)
    assert folds.encoded("movies", tmp_path) == rows
    assert folds.encoded("movies", tmp_path) == rows
    assert len(asked) == 1


@pytest.mark.parametrize("row", RECIPES)
def test_recipes_are_ones_that_lorafx_takes(row: str) -> None:
    for budget in (1.0, *frontier.BUDGETS):
        passes = Recipe.of({"pass": RECIPES[row].passes(budget)}).passes
        assert len(passes) == (1 if budget == 1.0 else 2)


def test_the_authors_gates_close_rows_and_columns_for_a_budget_of_weights() -> None:
    gates = RECIPES["authors-finegates"].passes(0.36)[1]
    assert gates["target"] == pytest.approx(0.4)
    assert not gates["couple"]


def test_a_variant_is_another_row_with_other_options() -> None:
    name, made = variant("slow=fine-distilled:gate_rate=0.01,lora.rank=4,distill=0.7,before=0.3", RECIPES)
    assert name == "slow"
    assert made.before == 0.3
    assert made.training == {**RECIPES["fine-distilled"].training, "distill": 0.7}
    lora, gates = made.passes(0.6)
    assert (lora["rank"], gates["gate_rate"], gates["budget"]) == (4, 0.01, 0.6)
    assert frontier.needs("slow", {"slow": made}) == (LORA,)


@pytest.mark.parametrize("text", ["fine:ramp=0.3", "a=none:ramp=0.3", "a=fine:prilora.rank=3", "fine=fine:ramp=0.3"])
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        variant(text, RECIPES)


def test_runs_say_what_they_were_trained_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table needs no variant said again, and training takes none of another meaning for it."""
    _, made = variant("slow=fine:gate_rate=0.01", RECIPES)
    for row, budget in ((LORA, 1.0), ("slow", 0.4)):
        folder = frontier.folder_of(tmp_path, "movies", row, budget, 0)
        folder.mkdir(parents=True)
        told = {**run(row, budget, 0, 0.8), "recipe": dataclasses.asdict(made if row == "slow" else RECIPES[row])}
        (folder / frontier.SCORE).write_text(json.dumps(told))
    assert frontier_rows.recorded(tmp_path / "movies") == {LORA: RECIPES[LORA], "slow": made}
    frontier.main(["table", "--out", str(tmp_path)])
    assert "| slow | 40% |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="other options"):
        frontier.main(["train", "--out", str(tmp_path), "--rows", LORA, "--variant", "slow=fine:gate_rate=0.02"])


def test_rows_come_after_what_they_begin_with() -> None:
    order = [row for row, _ in frontier.wanted(["tp-taylor", "mask-search", "fine"], [0.4, 0.2], RECIPES)]
    assert order == [rivals.START, LORA, "tp-taylor", "tp-taylor", "mask-search", "mask-search", "fine", "fine"]


def job(folder: Path, name: str, code: str, *needs: str) -> jobs.Job:
    done = folder / name
    return jobs.Job(name, [sys.executable, "-c", code, str(done)], done, tuple(folder / need for need in needs))


WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).touch()"


def test_a_run_that_fails_takes_only_those_with_it_that_need_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    every = [
        job(tmp_path, "after the bad one", WRITES, "bad"),
        job(tmp_path, "bad", "raise SystemExit(3)"),
        job(tmp_path, "silent", "pass"),
        job(tmp_path, "last", WRITES, "good"),
        job(tmp_path, "good", WRITES),
    ]
    assert sorted(jobs.run_missing(every, 2)) == ["after the bad one", "bad", "silent"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "last"]
    assert "bad failed (exit status 3)" in capfd.readouterr().err
    assert jobs.run_missing([every[4]], 1) == []


def test_no_run_begins_after_its_time(tmp_path: Path) -> None:
    assert jobs.run_missing([job(tmp_path, "late", WRITES)], 1, until=0.0) == []
    assert not list(tmp_path.iterdir())


def test_the_search_of_masks_loses_the_least_importance_within_the_budget() -> None:
    """By trying every choice."""
    chance = torch.Generator().manual_seed(0)
    heads = [torch.rand(2, generator=chance) for _ in range(2)]
    neurons = [torch.rand(3, generator=chance) for _ in range(2)]
    of_head, of_neuron = 5, 2
    for budget in (0.8, 0.5, 0.3, 0.1):
        allowed = budget * (4 * of_head + 6 * of_neuron)
        gone = mask_search.search(heads, neurons, budget, of_head, of_neuron)
        places = [[(number, place) for number, own in enumerate(side) for place in own] for side in gone]
        assert (4 - len(places[0])) * of_head + (6 - len(places[1])) * of_neuron <= allowed
        lost = sum(heads[n][p] for n, p in places[0]) + sum(neurons[n][p] for n, p in places[1])
        every = torch.cat([*heads, *neurons]).tolist()
        costs = [of_head] * 4 + [of_neuron] * 6
        least = min(
            sum(value for value, stays in zip(every, kept, strict=True) if not stays)
            for kept in itertools.product((0, 1), repeat=10)
            if sum(cost for cost, stays in zip(costs, kept, strict=True) if stays) <= allowed
        )
        assert float(lost) == pytest.approx(least, rel=1e-6)


def test_the_least_important_leave_and_every_block_keeps_one() -> None:
    scores = [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.9, 0.05, 0.8])]
    assert rivals.least(scores, 3) == [[0, 1], [1]]
    assert rivals.lowest(scores, 3) == [[0, 1], [1]]
    assert rivals.lowest(scores, 4) == [[0, 1], [1, 2]]


def test_masked_out_is_what_masks_of_zero_give() -> None:
    torch.manual_seed(0)
    model: Any = hf.BertForSequenceClassification(bert_config()).eval()
    chosen: rivals.Chosen = {0: {"heads": [1], "neurons": [0, 5]}, 1: {"heads": [], "neurons": [7]}}
    masks = []
    for own in chosen.values():
        heads, neurons = torch.ones(2, 2), torch.ones(2, 48)
        heads[:, own["heads"]], neurons[:, own["neurons"]] = 0, 0
        masks.append((heads, neurons))
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        before = model(ids).logits
        with mask_search.masked(model, masks):
            expected = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        mask_search.mask_out(model, chosen)
        torch.testing.assert_close(model(ids).logits, expected)
    first = model.bert.encoder.layer[0]  # read by nobody, so that removal finds them
    assert not first.output.dense.weight[:, [0, 5]].any()
    assert not first.attention.output.dense.weight[:, 16:].any()
    assert not torch.allclose(expected, before)


def test_tuning_brings_a_sublayer_as_near_as_scales_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against least squares on the outputs themselves, one unit's contribution a column; and it can be done again."""
    torch.manual_seed(0)
    whole: Any = hf.BertForSequenceClassification(bert_config(initializer_range=0.3)).eval()
    texts = [{"input_ids": torch.randint(1, 45, (size,)).tolist(), "labels": 0} for size in (5, 9, 7, 12)]
    monkeypatch.setattr(rivals, "collator", lambda: hf.DataCollatorWithPadding(words()))
    monkeypatch.setattr(mask_search, "collator", rivals.collator)
    monkeypatch.setattr(mask_search, "RIDGE", 1e-9)
    chosen: rivals.Chosen = {0: {"heads": [1], "neurons": [*range(1, 48)]}, 1: {"heads": [], "neurons": []}}
    tuned, again = copy.deepcopy(whole), copy.deepcopy(whole)
    for model in (tuned, again):
        mask_search.mask_out(model, chosen)
    scales = mask_search.tune(tuned, whole, chosen, texts)
    batch = rivals.collator()(texts)
    read, residual = mask_search._seen(again, 0, 0, batch)
    read_whole, residual_whole = mask_search._seen(whole, 0, 0, batch)
    dense = again.bert.encoder.layer[0].attention.output.dense
    with torch.no_grad():
        wanted = whole.bert.encoder.layer[0].attention.output.dense(read_whole) + residual_whole - residual - dense.bias
        head = read[:, :16] @ dense.weight[:, :16].T
    best = float((head * wanted).sum() / head.square().sum())
    assert scales[0][0] == pytest.approx([best, 1.0], rel=1e-4)
    assert abs(best - 1) > 1e-3
    mask_search.scale(again, scales)
    for first, second in zip(tuned.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(first, second)


def test_sizes_are_counted_as_lorafx_counts_them() -> None:
    program = captured()
    counted = [sum(size for block, size in by(program).items() if block) for by in (weights_by_block, flops_by_block)]
    assert rivals.sizes(program.source.model) == tuple(counted)


def test_a_run_that_kept_its_scores_alone_is_made_again_by_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(layers: int | None = None) -> Any:
        config = bert_config(num_hidden_layers=2 if layers is None else layers)
        return hf.BertForSequenceClassification(config)

    monkeypatch.setattr(rivals, "sequence_classifier", small)
    whole = small()
    width = whole.bert.encoder.layer[0].attention.self.attention_head_size
    fewer = frontier_exports.sized({"left": {}, "removed": [(0, 3), (1, 0)]})
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in rivals.linear(fewer)}
    hidden, neurons = whole.config.hidden_size, whole.config.intermediate_size
    assert sizes["bert.encoder.layer.0.intermediate.dense"] == (neurons - 3, hidden)
    assert sizes["bert.encoder.layer.0.output.dense"] == (hidden, neurons - 3)
    for name in ("query", "key", "value"):
        assert sizes[f"bert.encoder.layer.1.attention.self.{name}"] == (hidden - width, hidden)
    assert sizes["bert.encoder.layer.1.attention.output.dense"] == (hidden, hidden - width)
    batch = {"input_ids": torch.arange(5, 15).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    assert fewer(**batch).logits.shape == (2, whole.config.num_labels)
    assert frontier_exports.sized({"left": sizes, "removed": None}).config.num_hidden_layers == 2
    del sizes["bert.encoder.layer.0.output.dense"], sizes["bert.encoder.layer.0.intermediate.dense"]
    with pytest.raises(SystemExit, match="a sublayer is gone"):
        frontier_exports.sized({"left": sizes})


def run(row: str, budget: float, fold: int, accuracy: float) -> dict[str, Any]:
    left = {"weights": [100, round(100 * budget)], "flops": [200, round(200 * budget)]}
    return {"row": row, "budget": budget, "fold": fold, "accuracy": accuracy, **left}


def shown() -> list[frontier_show.Point]:
    runs = [run(LORA, 1.0, fold, 0.8 + 0.01 * fold) for fold in range(5)]
    runs += [run("fine", 0.4, fold, 0.79 + 0.01 * fold) for fold in range(5)]
    runs += [run("first-layers", 0.4, fold, 0.75 + 0.02 * fold) for fold in range(3)]
    shapes = {frontier_show.shape_name(shape): number for number, shape in enumerate(frontier_show.SHAPES, 1)}
    times = {
        frontier_show.label(row, budget): {
            shape: {"median": number * budget / 1e3, "ratio": 1 / budget} for shape, number in shapes.items()
        }
        for row, budget in ((LORA, 1.0), ("fine", 0.4))
    }
    return frontier_show.points(runs, times)


def test_the_table_says_what_is_lost_fold_by_fold() -> None:
    lines = frontier_show.table(shown()).splitlines()
    assert "| LoRA alone | 100% | 100.0% | 100.0% | 0.8200 |  | 1.0 (1.00x) | 2.0 (1.00x) | 3.0 (1.00x) |" in lines
    fine = "| lorafx, fine | 40% | 40.0% | 40.0% | 0.8100 | 1.00 ± 0.00 | 0.4 (2.50x) | 0.8 (2.50x) | 1.2 (2.50x) |"
    assert fine in lines
    # Lost 5, 4 and 3 points in the folds that are there: their mean, and 1 / √3.
    assert any(line.endswith("| 0.7700 | 4.00 ± 0.58 |  |  |  |") for line in lines)
    (first,) = frontier_show.points([run(LORA, 1.0, 0, 0.8), run("fine", 0.4, 0, 0.7)], {})[1:]
    assert "| 0.7000 | 10.00 |" in frontier_show.table([first])
    assert lines[-1] == "Rows have 3 to 5 of 5 folds so far."


def test_the_figure_is_the_same_file_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        frontier_show.figure(shown(), tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert text.count("milliseconds") == 3
    with pytest.raises(SystemExit, match="timed"):
        frontier_show.figure(frontier_show.points([run(LORA, 1.0, 0, 0.8)], {}), tmp_path / "c.svg")


def test_finished_runs_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, budget in ((LORA, 1.0), ("fine", 0.6)):
        folder = frontier.folder_of(tmp_path, "movies", row, budget, 0)
        folder.mkdir(parents=True)
        (folder / frontier.SCORE).write_text(json.dumps(run(row, budget, 0, 0.8)))
    frontier.main(["table", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| lorafx, fine | 60% |" in out
    with pytest.raises(SystemExit, match="no row"):
        frontier.main(["table", "--out", str(tmp_path), "--rows", "fines"])
