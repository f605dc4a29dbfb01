"""Training: the loop, HF Trainer, two processes; methods' hooks, accumulation, resuming, the best checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from lorafx.errors import ArtifactError, LorafxError, RecipeError, UsageError
from lorafx.frontend.capture import capture
from lorafx.frontend.load import load
from lorafx.passes.finegates import Finegates
from lorafx.passes.lora import Lora
from lorafx.pipeline import fold, rewrite
from lorafx.public import Program
from lorafx.training.fit import TrainResult, train
from lorafx.training.rows import Rows
from lorafx.training.trainer import STATE, LorafxCallback, MethodTrainerMixin, Trainer, last_checkpoint, state_of
from tests import ddp_worker
from tests.processes import run_together
from tests.small import (
    Notes,
    adapted,
    bert,
    bert_config,
    captured,
    example,
    gpt2,
    largest_difference,
    learned,
    llama,
    table,
    words,
)  # fmt: skip

WEIGHT = Notes().weight
#: Rounding of sums in another order, after a few steps of AdamW at this learning rate on fp32 parameters of size 0.1.
ROUNDING = 1e-6
FAST: dict[str, Any] = {"progress": False, "batch_size": 16, "epochs": 1.0, "learning_rate": 1e-2, "log_steps": 1}


def fit(program: Program, rows: int = 48, **options: Any) -> Any:
    return train(program, table(rows), tokenizer=options.pop("tokenizer", None) or words(), **{**FAST, **options})


def notes(program: Program) -> Tensor:
    """What the method noted, the same in every module but for the gradient's square."""
    found = torch.stack([value for name, value in program.learned().items() if name.endswith(".notes")])
    assert (found[:, :3] == found[0, :3]).all()
    return found[0, :3]


# ---- the plain loop


def test_ten_lines_train_and_tell_the_methods() -> None:
    program = adapted()
    model = program.module()
    model.total_steps = 3
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    before = learned(program)
    for step in range(3):
        batch = ddp_worker.loop_batch(step, 0)
        loss = model(**batch).loss + (model.penalty() or 0)
        loss.backward()
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    assert notes(program).tolist() == [3, 3, 3]
    assert int(model.clock) == 3
    after = learned(program)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_penalty_has_the_gradient_it_says() -> None:
    program = adapted()
    model = program.module()
    penalty = model.penalty()
    assert penalty is not None
    penalty.backward()
    for name, value in program.trainable().items():
        if "lora_A" in name:
            assert value.grad is not None
            assert torch.allclose(value.grad, 2 * WEIGHT * value)
        else:
            assert value.grad is None


# ---- HF Trainer


def test_trainer_does_what_the_loop_does() -> None:
    program, twin = adapted(), adapted()
    seen: list[dict[str, Tensor]] = []

    class Watch(Trainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
            seen.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, num_items_in_batch)

    arguments = hf.TrainingArguments(
        "unused", per_device_train_batch_size=16, max_steps=5, learning_rate=1e-2, lr_scheduler_type="constant",
        max_grad_norm=0.5, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", optim="adamw_torch",
    )  # fmt: skip
    Watch(program.module(), arguments, hf.DataCollatorWithPadding(words()), rows_of()).train()
    assert len(seen) == 5

    model = twin.module()
    model.total_steps = 5
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    for batch in seen:
        (model(**batch).loss + (model.penalty() or 0)).backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    assert largest_difference(learned(program), learned(twin)) <= ROUNDING


def test_train_reports_and_leaves_things_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    program = adapted()
    program.config.use_cache = True
    result = fit(program, rows=33, eval_data=table(21, seed=1), epochs=2, progress=True)
    assert notes(program).tolist() == [6, 6, 6]  # 33 rows: two batches of 16 and one of a single row, twice
    assert result.metrics.keys() == {"train_loss", "steps", "epochs", "eval_loss", "eval_accuracy"}
    assert (result.metrics["steps"], result.metrics["epochs"]) == (6, 2.0)
    assert result.is_main
    assert result.seconds > 0
    assert [entry["step"] for entry in result.history if "penalty" in entry] == [1, 2, 3, 4, 5, 6]
    assert json.loads(json.dumps(result.to_json()))["metrics"] == result.metrics
    assert program.config.use_cache is True
    out, err = capfd.readouterr()
    assert out == ""  # stdout is for results
    assert "step 1" in err
    assert "eval_accuracy" in err


def test_metrics_are_of_the_final_weights() -> None:
    program, held_out = adapted(), table(21, seed=1)
    result = fit(program, eval_data=held_out)
    model = program.module().eval()
    batch = words()(held_out["text"], padding=True, return_tensors="pt")
    labels = torch.tensor(held_out["label"])
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
    assert result.metrics["eval_accuracy"] == float((outputs.logits.argmax(-1) == labels).double().mean())
    assert result.metrics["eval_loss"] == pytest.approx(outputs.loss.item(), abs=1e-6)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_language_model_learns_texts(build: Callable[..., nn.Module]) -> None:
    program = adapted(captured(build))
    held_out = {"text": table(21, seed=1)["text"]}
    result = fit(program, eval_data=held_out, epochs=2)
    assert result.metrics["eval_loss"] < math.log(45)  # below that of guessing
    model, total, count = program.module().eval(), 0.0, 0
    for text in held_out["text"]:
        ids = torch.tensor([words()(text)["input_ids"]])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    assert result.metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


# ---- accumulation


def regression(**changes: Any) -> nn.Module:
    return bert(num_labels=1, **changes)


@pytest.mark.parametrize("build", [bert, gpt2, regression])
def test_two_micro_batches_of_16_are_one_of_32(build: Callable[..., nn.Module]) -> None:
    programs = []
    for split in ({"batch_size": 32}, {"batch_size": 16, "accumulate": 2}):
        program = adapted(captured(build) if build is not regression else capture(seeded(build), inputs=example(True)))
        fit(program, rows=72, learning_rate=1e-3, **split)  # two whole steps and one of 8 rows
        assert notes(program).tolist() == [3, 3, 3]
        programs.append(learned(program))
    assert largest_difference(*programs) <= ROUNDING


def seeded(build: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


# ---- resuming


class Stop(TrainerCallback):
    """Breaks off training after a number of steps, as a kill would."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


DROPS: dict[str, Any] = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def test_resumed_equals_uninterrupted_bit_by_bit(tmp_path: Path) -> None:
    base = captured(bert, **DROPS)  # dropout: the random state is resumed as well
    options: dict[str, Any] = {
        "batch_size": 8, "accumulate": 2, "epochs": 2, "save_steps": 2, "keep_best": True,
        "eval_data": table(21, seed=1),
    }  # fmt: skip
    whole, broken, resumed = adapted(base), adapted(base), adapted(base, seed=2)
    expected = fit(whole, output_dir=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(broken, output_dir=tmp_path / "broken", callbacks=[Stop(5)], **options)
    assert last_checkpoint(tmp_path / "broken") == tmp_path / "broken" / "checkpoint-4"
    result = fit(resumed, output_dir=tmp_path / "broken", resume=True, **options)
    for name, value in learned(whole).items():
        assert torch.equal(value, resumed.learned()[name]), name
    last = [load_file(tmp_path / name / "checkpoint-6" / STATE) for name in ("whole", "broken")]
    assert last[0].keys() == last[1].keys()
    assert largest_difference(*last) == 0.0
    assert int(last[0]["clock"]) == 6
    assert result.metrics["eval_loss"] == expected.metrics["eval_loss"]
    assert result.best_step == expected.best_step


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training of four steps that saved every second."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fit(adapted(), rows=64, output_dir=folder, save_steps=2)
    return folder


def test_checkpoints_hold_what_is_learned_and_nothing_else(checkpoints: Path) -> None:
    stored = load_file(checkpoints / "checkpoint-4" / STATE)
    program = adapted()
    assert stored.keys() == {*program.learned(), "clock"}
    assert int(stored["clock"]) == 4
    assert not (checkpoints / "checkpoint-4" / "model.safetensors").exists()


def test_a_half_written_checkpoint_is_passed_over(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints, tmp_path / "out")
    newest = tmp_path / "out" / "checkpoint-4"
    (newest / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    with pytest.raises(ArtifactError, match=r"checkpoint-4: not a whole checkpoint: no trainer_state\.json"):
        fit(adapted(), resume=newest)
    (newest / "trainer_state.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="checkpoint-4: not a whole checkpoint"):
        fit(adapted(), resume=newest)
    state = tmp_path / "out" / "checkpoint-2" / STATE
    state.write_bytes(state.read_bytes()[:-8])
    assert last_checkpoint(tmp_path / "out") is None
    with pytest.raises(ArtifactError, match="no whole checkpoint to resume from"):
        fit(adapted(), output_dir=tmp_path / "out", resume=True)


def test_a_checkpoint_of_another_recipe_is_refused(checkpoints: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"made by another recipe: it has .*lora_A.* as \(2, 32\), this program as \(3"
    ):
        fit(adapted(method=Notes(rank=3)), resume=checkpoints / "checkpoint-2")
    with pytest.raises(
        ArtifactError, match=r"made by another recipe: it has .*notes as \(4,\), this program as missing"
    ):
        fit(adapted(method=Lora(rank=2)), resume=checkpoints / "checkpoint-2")


def test_a_new_training_does_not_mix_with_old_checkpoints(checkpoints: Path) -> None:
    with pytest.raises(UsageError, match="checkpoint-4: left by an earlier training"):
        fit(adapted(), output_dir=checkpoints, save_steps=2)


# ---- the best checkpoint


class Spoil(TrainerCallback):
    """Turns the head round before every evaluation but the first."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.epoch > 1:
            with torch.no_grad():
                model.classifier.weight.neg_()
                model.classifier.bias.neg_()


def test_keep_best_ends_with_the_best_weights(tmp_path: Path) -> None:
    program = adapted()
    result = fit(
        program,
        rows=256,
        epochs=2,
        eval_data=table(40, seed=1),
        output_dir=tmp_path,
        keep_best=True,
        callbacks=[Spoil()],
    )
    scores = {entry["step"]: entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry}
    assert scores[16] > scores[32]  # else the test proves nothing
    assert result.best_step == 16
    assert result.metrics["eval_accuracy"] == scores[16]
    stored = load_file(tmp_path / "checkpoint-16" / STATE)
    assert all(torch.equal(value, stored[name]) for name, value in program.learned().items())


def test_a_training_is_scored_before_it_begins_and_told_by_its_program() -> None:
    """Weights are bit for bit those of a training without that evaluation: it takes no random numbers."""
    ends = []
    for scored in (True, False):
        program = adapted(captured(bert, hidden_dropout_prob=0.3))
        result = fit(program, eval_data=table(20, seed=1), trainer={"eval_on_start": scored})
        ends.append(program.learned())
        assert [entry["step"] for entry in result.history if "eval_accuracy" in entry] == [0, 3][not scored :]
        assert program.trained == result.to_json()
        assert program.report.sections["training"]["metrics"]["eval_accuracy"] == result.metrics["eval_accuracy"]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    fit(program)
    assert [each["metrics"] for each in program.earlier] == [result.metrics]


def test_a_training_tells_what_trained_and_on_which_rows_it_was_scored() -> None:
    """So that scores are held beside each other only where they are on the same ones."""
    program = adapted()
    first = fit(program, eval_data=table(20, seed=1), trainer={"eval_on_start": False})
    gated = rewrite(program, [Finegates()])
    more = {"eval_data": table(20, seed=1), "epochs": 1, "trainer": {"eval_on_start": False}}
    with_gates = fit(gated, **more)
    assert (first.passes, with_gates.passes) == (("small",), ("small", "finegates"))
    assert with_gates.evaluated == first.evaluated
    (before,) = gated.earlier
    assert (before["passes"], before["evaluated"]) == (["small"], first.evaluated)
    others = [
        fit(adapted(), **{**more, "eval_data": data}).evaluated for data in (table(20, seed=2), table(19, seed=1))
    ]
    assert len({*others, first.evaluated}) == 3
    assert fit(adapted(), epochs=1).evaluated is None


def test_a_resumed_training_is_not_scored_again_before_it_goes_on(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_data": table(20, seed=1), "output_dir": tmp_path, "save_steps": 2}
    fit(adapted(), **options)
    shutil.rmtree(tmp_path / "checkpoint-3", ignore_errors=True)
    result = fit(adapted(), resume=True, **options)
    assert [entry["step"] for entry in result.history if "eval_accuracy" in entry] == [0, 3]


def test_keep_best_needs_no_folder_of_ones_own() -> None:
    assert fit(adapted(), eval_data=table(21, seed=1), keep_best=True).best_step == 3


# ---- precision, recomputation, devices


def qwen3(**changes: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    rest: dict[str, Any] = {
        "vocab_size": 45,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
    }
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**sizes, **rest, **changes}))


def half(**changes: Any) -> nn.Module:
    return bert(**changes).to(torch.bfloat16)


@pytest.mark.parametrize(("build", "bf16"), [(bert, True), (qwen3, True), (half, False), (half, True)])
def test_bf16_trains_and_adapters_stay_fp32(build: Callable[..., nn.Module], bf16: bool) -> None:
    # Qwen3 normalises queries in fp32 whatever comes in: its graph must not insist on what came in at capture.
    program = adapted(captured(bert) if build is bert else capture(seeded(build), inputs=example(build is half)))
    before = learned(program)
    result = fit(program, bf16=bf16, eval_data=table(21, seed=1))
    assert math.isfinite(result.metrics["train_loss"])
    assert math.isfinite(result.metrics["eval_loss"])
    for name, value in program.learned().items():
        if program.roles[name] == "adapter":
            assert value.dtype == torch.float32
            assert not torch.equal(value, before[name])


def test_recomputing_activations_changes_nothing() -> None:
    base = captured(bert, **DROPS)
    plain, recomputed = adapted(base), adapted(base)
    fit(plain)
    fit(recomputed, checkpointing=True)
    assert largest_difference(learned(plain), learned(recomputed)) <= ROUNDING


def test_transformers_own_flag_recomputes_too() -> None:
    program, twin = adapted(), adapted()
    fit(program, trainer={"activation_checkpointing": True})
    fit(twin)
    assert largest_difference(learned(program), learned(twin)) <= ROUNDING
    with pytest.raises(UsageError, match="recomputes every block"):
        fit(adapted(), trainer={"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}})


@pytest.mark.parametrize("build", [bert, gpt2, llama])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_graph_goes_where_its_tensors_go(build: Callable[..., nn.Module], checkpointing: bool) -> None:
    # Ranges and masks made in the graph must follow, or a model captured on the CPU would train nowhere else.
    program = rewrite(captured(build), [Lora(rank=2)])
    model = program.module().to("meta")
    model.checkpointing = checkpointing
    inputs = {name: value.to("meta") for name, value in example(build is bert).items()}
    for training in (True, False):
        logits = model.train(training)(**inputs).logits
        assert logits.device.type == "meta"


def test_the_module_compiles_without_a_break() -> None:
    model, inputs = adapted().module(), example(True)
    for training in (True, False):
        expected = model.train(training)(**inputs).logits
        torch.compiler.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits, expected)


# ---- losses


def token_bert() -> nn.Module:
    return hf.BertForTokenClassification(bert_config(num_labels=3))


def span_bert() -> nn.Module:
    return hf.BertForQuestionAnswering(bert_config())


def masked_bert() -> nn.Module:
    return hf.BertForMaskedLM(bert_config())


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 45, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    rest: dict[str, Any] = {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **rest))


IDS = example(False)["input_ids"]
TARGETS: dict[Callable[[], nn.Module], dict[str, Tensor]] = {
    token_bert: {"labels": IDS.remainder(3)},
    span_bert: {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])},
    masked_bert: {"labels": IDS.masked_fill(IDS == 7, -100)},
    t5: {"labels": IDS},
}


@pytest.mark.parametrize("build", TARGETS)
def test_losses_are_the_models_own(build: Callable[[], nn.Module]) -> None:
    eager = seeded(build)
    inputs = example(False)
    if build is t5:
        inputs["decoder_input_ids"] = torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], 1)
    program = capture(eager, inputs=inputs)
    ours = program.module()(**inputs, **TARGETS[build]).loss
    theirs = eager.train()(**inputs, **TARGETS[build]).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_model_without_a_loss_says_so() -> None:
    program = capture(hf.BertForNextSentencePrediction(bert_config()), inputs=example(True))
    with pytest.raises(UsageError, match="no loss of its own"):
        program.module()(**example(True), labels=torch.tensor([0, 1]))


# ---- scripts of one's own


def rows_of(count: int = 48) -> Rows:
    columns = table(count)
    return Rows({**words()(columns["text"]), "labels": columns["label"]})


def arguments(folder: Path, **changes: Any) -> hf.TrainingArguments:
    plain: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "max_steps": 3,
    }
    return hf.TrainingArguments(str(folder), **{**plain, **changes})


def test_the_mixin_joins_a_trainer_subclass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Smooth(hf.Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
            loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
            return (loss, outputs) if return_outputs else loss

    class Mine(MethodTrainerMixin, Smooth):
        loss_is_scaled_for_ga = False

    parts = []
    for split in (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    ):
        program = adapted()
        Mine(program.module(), arguments(tmp_path, **split), hf.DataCollatorWithPadding(words()), rows_of()).train()
        assert notes(program).tolist() == [3, 3, 3]
        parts.append(learned(program))
    assert largest_difference(*parts) <= ROUNDING
    capsys.readouterr()  # transformers prints the log lines of a Trainer without a progress bar


def test_the_callback_serves_a_trainer_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = adapted()
    hf.Trainer(
        program.module(),
        arguments(tmp_path),
        hf.DataCollatorWithPadding(words()),
        rows_of(),
        callbacks=[LorafxCallback()],
    ).train()
    assert notes(program).tolist() == [3, 3, 3]
    with pytest.raises(UsageError, match="holds no rewritten model"):
        Trainer(nn.Linear(2, 2), arguments(tmp_path))
    capsys.readouterr()


def test_weight_decay_leaves_gates_alone(tmp_path: Path) -> None:
    program = adapted()
    gate = next(name for name in program.trainable() if "lora_A" in name)
    program.roles[gate] = "gate"
    model = program.module()
    decayed = Trainer(model, arguments(tmp_path)).get_decay_parameter_names(model)
    assert gate not in decayed
    assert gate.replace("lora_A", "lora_B") in decayed
    assert "classifier.bias" not in decayed


def test_a_dataset_of_model_inputs_is_taken_as_it_is() -> None:
    program, twin = adapted(), adapted()
    fit(program)
    train(twin, rows_of(), tokenizer=words(), **FAST)
    assert largest_difference(learned(program), learned(twin)) == 0.0


def test_a_program_without_methods_trains_in_full() -> None:
    program = captured(bert, seed=3).copy()
    result = fit(program)
    assert result.metrics["steps"] == 3
    assert set(program.learned()) == set(program.trainable())


def test_class_names_survive_saving_and_folding(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    words().save_pretrained(tmp_path / "base")
    program = rewrite(capture(tmp_path / "base"), [Lora(rank=2)])
    columns = table(16)
    named = {**columns, "label": [("no", "yes")[label] for label in columns["label"]]}
    train(program, named, **FAST)  # with the tokenizer of the checkpoint
    program.save(tmp_path / "run")
    assert fold(load(tmp_path / "run")).config.id2label == {0: "no", 1: "yes"}


# ---- errors


def folded() -> Program:
    return fold(adapted())


def frozen() -> Program:
    program = captured(bert).copy()
    for value in program.trainable().values():
        value.requires_grad_(False)
    return program


BAD: dict[str, tuple[Callable[[], Program], dict[str, Any], type[LorafxError], str]] = {
    "option": (adapted, {"epoch": 3}, RecipeError, "unknown key 'epoch' (did you mean 'epochs'?)"),
    "type": (adapted, {"epochs": "three"}, RecipeError, "epochs = 'three' is not a number"),
    "schedule": (adapted, {"schedule": "linea"}, UsageError, "unknown schedule 'linea' (did you mean 'linear'?)"),
    "trainer": (adapted, {"trainer": {"optimm": 1}}, UsageError, "no 'optimm' (did you mean 'optim'?)"),
    "value": (adapted, {"trainer": {"optim": "adamm"}}, UsageError, "trainer: optim = 'adamm' is not one of adamw"),
    "twice": (
        adapted,
        {"trainer": {"learning_rate": 0.1}},
        UsageError,
        "trainer: learning_rate is said by the training option 'learning_rate'; leave it out here",
    ),
    "counted": (adapted, {"warmup": 0.1, "trainer": {"warmup_steps": 5}}, UsageError, "the training option 'warmup'"),
    "batch": (adapted, {"batch_size": 0}, UsageError, "batch_size = 0, but it is at least 1"),
    "warmup": (adapted, {"warmup": 1.0}, UsageError, "warmup = 1.0, but it is at least 0 and below 1"),
    "epochs": (adapted, {"epochs": 0}, UsageError, "epochs = 0 trains nothing; give epochs or max_steps"),
    "steps": (adapted, {"max_steps": 0}, UsageError, "max_steps = 0 trains nothing; give steps, or -1"),
    "switch": (adapted, {"trainer": {"bf16": "False"}}, UsageError, "trainer: bf16 = 'False' is not true or false"),
    "number": (adapted, {"trainer": {"adam_beta1": "x"}}, UsageError, "trainer: adam_beta1 = 'x' is not a number"),
    "whole": (adapted, {"trainer": {"data_seed": 1.5}}, UsageError, "trainer: data_seed = 1.5 is not a whole number"),
    "range": (adapted, {"trainer": {"adam_beta1": 2}}, UsageError, "trainer = {'adam_beta1': 2}: Invalid beta"),
    "feature": (
        adapted,
        {"trainer": {"neftune_noise_alpha": 5}},
        UsageError,
        "HF Trainer cannot train with trainer = {'neftune_noise_alpha': 5}: ",
    ),
    "length": (
        adapted,
        {"max_length": 2},
        UsageError,
        "max_length = 2 leaves no room for text beside 2 special tokens",
    ),
    "best": (adapted, {"keep_best": True}, UsageError, "keep_best needs evaluation data"),
    "resume": (adapted, {"resume": True}, UsageError, "resume needs output_dir"),
    "folded": (folded, {}, UsageError, "was made ready for evaluation (folded, say); train it before that"),
    "nothing": (frozen, {}, UsageError, "nothing to train; rewrite it with a method"),
    "lost": (adapted, {"resume": "/no/such/checkpoint"}, ArtifactError, "not a whole checkpoint: no adapter_model"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_what_and_what_to_do(case: str) -> None:
    program, options, kind, message = BAD[case]
    with pytest.raises(kind) as caught:
        fit(program(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("log_steps", [1, 50])
def test_a_training_that_diverges_stops_and_says_so(log_steps: int) -> None:
    seen: list[int] = []

    class Seen(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    program = adapted()
    with pytest.raises(UsageError, match=r"diverged: \d+ of \d+ trained weights .* learning_rate than 1e\+30"):
        fit(program, callbacks=[Seen()], learning_rate=1e30, max_grad_norm=0.0, epochs=5.0, log_steps=log_steps)
    assert seen[-1] < 10 if log_steps == 1 else seen[-1] == 15
    assert program.trained is None, "nothing is told of it"


def test_a_capture_without_weights_does_not_train(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)  # type: ignore[operator]
    program = capture(tmp_path, meta=True)
    with pytest.raises(UsageError, match="captured without weights"):
        fit(rewrite(program, [Lora(rank=2)]))


# ---- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of one group ended with (see ddp_worker)."""
    return run_together("tests.ddp_worker", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="module")
def one_process() -> tuple[Program, TrainResult]:
    """What one process with the double batch learns, and reports."""
    program = adapted()
    held_out = table(ddp_worker.HELD_OUT, seed=1)
    options = {**ddp_worker.COMMON, "batch_size": 16}
    return program, train(program, table(ddp_worker.ROWS), eval_data=held_out, tokenizer=words(), **options)


@pytest.mark.parametrize("name", ddp_worker.RUNS)
def test_two_processes_train_like_one_with_the_double_batch(
    two_processes: Path, one_process: tuple[Program, TrainResult], name: str
) -> None:
    ranks = [load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert largest_difference(*ranks) == 0.0
    alone, expected = one_process
    assert largest_difference(ranks[0], learned(alone)) <= ROUNDING
    results = [json.loads((two_processes / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert [result["is_main"] for result in results] == [True, False]
    assert results[0]["metrics"]["eval_accuracy"] == expected.metrics["eval_accuracy"]
    assert results[0]["best_step"] == expected.best_step
    assert notes(alone)[0] == expected.best_step


def test_the_plain_loop_runs_in_two_processes(two_processes: Path) -> None:
    ranks = [load_file(two_processes / f"loop-{rank}.safetensors") for rank in range(2)]
    assert largest_difference(*ranks) == 0.0
    program = adapted()
    model = program.module()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for step in range(ddp_worker.LOOP_STEPS):
        parts = [ddp_worker.loop_batch(step, rank) for rank in range(2)]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        (model(**batch).loss + (model.penalty() or 0)).backward()
        if step == 0:
            for name in program.names("statistic"):
                program.tensor(name)[0] += 0.5  # the mean over the processes
        model.before_step()
        optimizer.step()
        model.after_step()
        optimizer.zero_grad()
    assert largest_difference(ranks[0], learned(program)) <= ROUNDING


def test_several_processes_need_a_shared_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="give output_dir"):
        fit(adapted(), eval_data=table(21, seed=1), keep_best=True)


def test_state_is_a_copy() -> None:
    program = adapted()
    state = state_of(program.module())
    name = next(iter(program.trainable()))
    with torch.no_grad():
        program.tensor(name).add_(1)
    assert not torch.equal(state[name], program.tensor(name))
