"""Learning from a teacher: what the loss is, for which outputs, and who can teach whom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lorafx
from lorafx.cli import main
from lorafx.errors import UsageError
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.public import Program
from tests.captures import shared

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


@shared
def captured(labels: int, layers: int, problem: str) -> Program:
    torch.manual_seed(0)
    told = {"num_labels": labels, "num_hidden_layers": layers, "problem_type": problem}
    config: dict[str, Any] = {**SIZES, **QUIET, **told}
    return lorafx.capture(BertForSequenceClassification(BertConfig(**config)))


def classifier(labels: int = 3, layers: int = 2, problem: str = "single_label_classification") -> Program:
    return lorafx.rewrite(captured(labels, layers, problem), [Lora(rank=2)])


def batch(rows: int = 4) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    mask = torch.ones(rows, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ids = torch.randint(1, 40, (rows, 6), generator=made)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def moved(program: Program, seed: int = 1) -> Program:
    """``program`` with other adapters."""
    made = torch.Generator().manual_seed(seed)
    for name in program.names("adapter"):
        program.tensor(name).data.normal_(std=0.3, generator=made)
    return program


def answers(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return program.module().eval()(**inputs).logits


def softened(given: Tensor, shown: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student), a mean over the rows."""
    p, q = (shown / temperature).softmax(-1), (given / temperature).softmax(-1)
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


def test_the_loss_is_the_labels_and_the_softened_answers_by_their_shares():
    student, teacher = moved(classifier(), 1), moved(classifier(), 2)
    inputs, labels = batch(), torch.tensor([0, 2, 1, 2])
    module = student.module().train()
    given, shown = module(**inputs).logits, answers(teacher, inputs)
    module.learn_from(teacher, share=0.7, temperature=3.0)
    found = module(**inputs, labels=labels).loss
    want = 0.3 * functional.cross_entropy(given, labels) + 0.7 * softened(given, shown, 3.0)
    torch.testing.assert_close(found, want)
    module.eval()
    torch.testing.assert_close(module(**inputs, labels=labels).loss, functional.cross_entropy(given, labels))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_problems_have_losses_of_their_own(kind: str):
    size = 1 if kind == "regression" else 3
    student, teacher = (moved(classifier(size, problem=kind), seed) for seed in (1, 2))
    inputs, labels = batch(), torch.rand(4, size)
    module = student.module().train()
    given, shown = module(**inputs).logits, answers(teacher, inputs)
    module.learn_from(teacher, share=1.0, temperature=2.0)
    found = module(**inputs, labels=labels.squeeze(-1)).loss
    if kind == "regression":
        want = (given - shown).square().mean()
    else:
        p, q = (shown / 2).sigmoid(), (given / 2).sigmoid()
        want = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(found, want)


@shared
def captured_decoder() -> Program:
    torch.manual_seed(0)
    return lorafx.capture(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)))


def decoder(seed: int) -> Program:
    return moved(lorafx.rewrite(captured_decoder(), [Lora(rank=2)]), seed)


@pytest.mark.parametrize("items", [None, 20])
def test_tokens_without_a_label_teach_nothing(items: int | None):
    student, teacher = decoder(1), decoder(2)
    ids = batch()["input_ids"]
    labels = ids.clone()
    labels[:, :3] = -100
    module = student.module().train()
    given, shown = module(input_ids=ids).logits[:, 2:-1], answers(teacher, {"input_ids": ids})[:, 2:-1]
    module.learn_from(teacher, share=1.0, temperature=2.0)
    counted = {} if items is None else {"num_items_in_batch": items}
    found = module(input_ids=ids, labels=labels, **counted).loss
    share = 1.0 if items is None else given.shape[:2].numel() / items
    torch.testing.assert_close(found, share * softened(given.flatten(0, 1), shown.flatten(0, 1), 2.0))


def test_hidden_states_are_compared_block_by_block_where_there_are_tokens():
    student, teacher = moved(classifier(), 1), moved(classifier(), 2)
    inputs, labels = batch(), torch.tensor([0, 2, 1, 2])
    module = student.module().train()
    module.learn_from(teacher, share=0.0, hidden=0.4)
    states: list[list[Tensor]] = []
    for program in (student, teacher):
        seen: dict[str, Tensor] = {}
        program.module().eval().run(inputs, seen)
        assert [*seen] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
        states.append([value.detach() for value in seen.values()])
    mask = inputs["attention_mask"].unsqueeze(-1)
    gaps = [((a - b).square() * mask).sum() / (b.square() * mask).sum() for a, b in zip(*states, strict=True)]
    outputs = module(**inputs, labels=labels)
    want = functional.cross_entropy(outputs.logits, labels) + 0.4 * torch.stack(gaps).mean()
    torch.testing.assert_close(outputs.loss, want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_program_teaches_itself_what_it_was(checkpointing: bool):
    program = lorafx.rewrite(moved(classifier()), [Finegates(budget=0.5)])
    inputs, labels = batch(), torch.tensor([0, 2, 1, 2])
    before = answers(program, inputs)
    module = program.module().train()
    module.total_steps = 3
    module.learn_from(program.copy(), share=1.0, hidden=1.0)
    if checkpointing:
        module.gradient_checkpointing_enable()
    optimiser = torch.optim.SGD(module.parameter_groups(lr=0.5))
    for _ in range(3):
        module(**inputs, labels=labels).loss.backward()
        module.before_step()
        optimiser.step()
        module.after_step()
        optimiser.zero_grad()
    assert not torch.equal(answers(program, inputs), before)
    assert module.teaching is not None
    torch.testing.assert_close(module.teaching.teacher(**inputs).logits, before)
    assert all(value.grad is None for value in module.teaching.teacher.parameters())


def test_learning_from_oneself_with_open_gates_costs_nothing_at_first():
    program = moved(classifier())
    module = program.module().train()
    module.learn_from(program.copy(), share=1.0, hidden=1.0)
    loss = module(**batch(), labels=torch.tensor([0, 2, 1, 2])).loss
    assert abs(loss.item()) < 1e-6


def test_who_cannot_teach_is_refused_in_a_line():
    module = classifier().module()
    with pytest.raises(UsageError, match="teach nothing"):
        module.learn_from(classifier(), share=0.0)
    with pytest.raises(UsageError, match="other inputs or outputs"):
        module.learn_from(decoder(0))
    deeper = classifier(layers=3)
    module.learn_from(deeper, share=0.5)
    with pytest.raises(UsageError, match="has 2 blocks and its teacher 3"):
        module.learn_from(deeper, share=0.5, hidden=1.0)
    module.learn_from(classifier(), share=0.5)
    with pytest.raises(UsageError, match="give labels"):
        module.train()(**batch())


def rows() -> dict[str, list[Any]]:
    made = batch(8)
    return {**{name: value.tolist() for name, value in made.items()}, "labels": [0, 1, 2, 0, 1, 2, 0, 1]}


def test_training_with_a_teacher_ends_nearer_to_it():
    inputs, teacher = batch(8), moved(classifier(), 2)
    shown = answers(teacher, inputs).log_softmax(-1)
    gaps = []
    taught: dict[str, Any] = {"teacher": teacher, "distill": 1.0, "distill_hidden": 0.1}
    plain: dict[str, Any] = {}
    for options in (plain, taught):
        student = moved(classifier(), 1)
        data = [dict(zip(rows(), row, strict=True)) for row in zip(*rows().values(), strict=True)]
        lorafx.train(student, data, max_steps=12, batch_size=8, learning_rate=1e-2, progress=False, **options)
        gaps.append(float((answers(student, inputs).log_softmax(-1) - shown).abs().mean()))
    assert gaps[1] < gaps[0] / 2


def test_options_without_a_teacher_that_knows_anything_are_refused(tmp_path: Any):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    model.bert.save_pretrained(tmp_path / "base")
    program = lorafx.rewrite(lorafx.capture(tmp_path / "base", "text-classification", 3), [Lora(rank=2)])
    with pytest.raises(UsageError, match=r"classifier.* was drawn at random and not trained"):
        lorafx.train(program, [], distill=0.5)
    with pytest.raises(UsageError, match="a teacher teaches by distill"):
        lorafx.train(program, [], teacher=program.copy())
    assert math.isfinite(program.trainable()["classifier.weight"].detach().sum())


def test_the_command_takes_a_teacher(tiny_checkpoint: Path, tiny_table: Path, tmp_path: Path):
    program = lorafx.rewrite(lorafx.capture(tiny_checkpoint, "text-classification", 2), [Lora(rank=2)])
    program.save(tmp_path / "run")
    lorafx.train(program, tiny_table, max_steps=1, progress=False)
    program.save(tmp_path / "teacher")
    command = ["train", str(tmp_path / "run"), "--data", str(tiny_table), "--max-steps", "1", "--distill", "1.0"]
    alone = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "alone")])
    assert alone.exit_code == 2, alone.output
    assert "was drawn at random and not trained" in alone.output
    taught = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out"), "--teacher", str(tmp_path / "teacher")])
    assert taught.exit_code == 0, taught.output
    assert lorafx.load(tmp_path / "out").trained is not None
