"""The few figures people ask of a report, before anything else: what it was, what training did, how small and how fast
it is, and whether it is the same function. Each is there only where it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from .contents import Contents, megabytes
from .facts import Facts, PassReport


@dataclass(frozen=True)
class Figure:
    """One figure: its title, the figure, and a note; ``said`` is its form in a sentence."""

    label: str
    value: str
    detail: str = ""
    said: str = ""

    @property
    def clause(self) -> str:
        """The figure as part of a sentence."""
        return self.said or f"{self.label} {self.value}"


#: The section of the trainings before the last one.
EARLIER = "earlier trainings"
#: Measures that are shares of 1: three decimals say the same of all of them.
SHARES = ("accuracy", "F1")
#: Names for people, of measures whose keys differ.
_CALLED = {"f1": "F1", "rmse": "root mean squared error"}


def called(key: str) -> str:
    """The name for people of a figure of an evaluation (``eval_f1``)."""
    name = key.removeprefix("eval_")
    return _CALLED.get(name, name.replace("_", " "))


def three_digits(value: float) -> str:
    """A number for people: three digits, or every digit before the point (4,420, not 4.42e+03)."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def score_text(measure: str, value: float) -> str:
    """A score for people."""
    return f"{value:.3f}" if measure in SHARES else three_digits(value)


@dataclass(frozen=True)
class Score:
    """What training did: one measure, before (where it was measured) and after each training, and on which data."""

    name: str
    values: tuple[float, ...]
    on: str

    @property
    def value(self) -> str:
        """All values; the last is the current one."""
        return " → ".join(score_text(self.name, value) for value in self.values)


def subject(facts: Facts) -> str:
    """What the report is about: the model, and the checkpoint it came from."""
    checkpoint = facts.model.get("checkpoint")
    if not checkpoint:
        return str(facts.model["class"])
    # Earlier versions wrote down its path; a model of the hub is known by org/name.
    named = PurePath(checkpoint).name if PurePath(checkpoint).is_absolute() else checkpoint
    return f"{facts.model['class']} from {named}"


def methods(facts: Facts) -> str:
    """What was put on the model and where: ``lora on 36 weights, finegates on 12``."""
    steps = [step for step in facts.passes if not step.folding and step.taken and _adds(step)]
    counts = [f"{step.name} on {len(step.taken)}" for step in steps]
    counts[:1] = [f"{counts[0]} weight{'s' if len(steps[0].taken) > 1 else ''}"] if counts else []
    return ", ".join(counts)


def _adds(step: PassReport) -> bool:
    """Whether a pass put something on the model, or changed it: turning into evaluation form does neither."""
    return step.tensors > 0 or step.promise != "exact"


def score_of(facts: Facts) -> Score | None:
    """How the trained model did: on evaluation data where there was some, else its loss; None when nothing trained."""
    training: Any = facts.sections.get("training")
    metrics = training.get("metrics") if isinstance(training, Mapping) else None
    if not isinstance(metrics, Mapping):
        return None
    key = measure_of(facts)
    if key is not None:
        return Score(called(key), (*_before(facts, key), float(metrics[key])), "on the evaluation data")
    loss = metrics.get("train_loss")
    logged = [float(entry["loss"]) for entry in training.get("history") or () if "loss" in entry]
    if len(logged) > 1:
        return Score("training loss", (logged[0], logged[-1]), "as first and last logged")
    return Score("training loss", (float(loss),), "on the training data") if isinstance(loss, (int, float)) else None


def measure_of(facts: Facts) -> str | None:
    """The key of the main figure of the last training's evaluation (``eval_accuracy``); None where nothing was."""
    training: Any = facts.sections.get("training")
    metrics = training.get("metrics") if isinstance(training, Mapping) else None
    if not isinstance(metrics, Mapping):
        return None
    keys = (f"eval_{training.get('metric')}", "eval_accuracy", "eval_perplexity", "eval_loss")
    return next((key for key in keys if isinstance(metrics.get(key), (int, float))), None)


def _before(facts: Facts, key: str) -> Iterator[float]:
    """What evaluation gave before the first step of each training, oldest first."""
    for training in (*earlier(facts), facts.sections["training"]):
        history = training.get("history") or ()
        yield from [float(entry[key]) for entry in history if entry.get("step") == 0 and key in entry][:1]


def earlier(facts: Facts) -> list[Mapping[str, Any]]:
    """The trainings before the last one, oldest first."""
    found = facts.sections.get(EARLIER)
    return [training for training in found if isinstance(training, Mapping)] if isinstance(found, list) else []


def figures(facts: Facts, contents: Contents) -> list[Figure]:
    """All that there are of a report, and of the folder it was written for."""
    found = (_training(facts), _trainable(facts), _size(facts, contents), _speed(facts), same_function(facts))
    count = f"{facts.parameters:,}"
    plain = Figure("size", count, "parameters", f"{count} parameters")
    return [figure for figure in found if figure is not None] or [plain]


def sentence(facts: Facts, contents: Contents) -> str:
    """The answer in one sentence."""
    clauses = [methods(facts), *(figure.clause for figure in figures(facts, contents))]
    return f"{subject(facts)}: {'; '.join(clause for clause in clauses if clause)}"


def _training(facts: Facts) -> Figure | None:
    score, training = score_of(facts), facts.sections.get("training")
    if score is None or training is None:
        return None
    trainings = [*earlier(facts), training]
    steps = [each.get("metrics", {}).get("steps") for each in trainings]
    seconds = [each.get("seconds") for each in trainings]
    counts = " + ".join(f"{count:,.0f}" for count in steps if isinstance(count, (int, float)))
    after = f", after {counts} steps" if counts else ""
    whole = sum(each for each in seconds if isinstance(each, (int, float)))
    took = f" in {duration(whole)}" if whole else ""
    return Figure(score.name, score.value, f"{score.on}{after}{took}")


def duration(seconds: float) -> str:
    """Seconds for people."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.0f} s"
    return f"{whole // 60} min" if whole < 6000 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _trainable(facts: Facts) -> Figure | None:
    if facts.model.get("folded") or facts.model.get("stage") == "eval" or not facts.trainable:
        return None
    share, of = facts.trainable / facts.parameters, f"{facts.parameters:,} parameters"
    return Figure(
        "trained" if "training" in facts.sections else "to train",
        f"{share:.2%}",
        f"{facts.trainable:,} of {of}",
        f"{facts.trainable:,} of {of} trainable ({share:.2%})",
    )


def _size(facts: Facts, contents: Contents) -> Figure | None:
    size = contents.size
    if not facts.model.get("folded"):
        alone = "" if facts.model.get("stage") == "eval" else " without the base"
        return None if size is None else Figure("on disk", megabytes(size), alone.strip(), megabytes(size) + alone)
    before, after = facts.model.get("base parameters"), facts.parameters
    change = f"{after:,} parameters"
    if before and after != before:
        change = f"{abs(after - before) / before:.1%} {'fewer' if after < before else 'more'} parameters than the base"
    elif before:
        change = f"{after:,} parameters, as many as the base"
    if size is None:
        return Figure("size", f"{after:,}", change.removeprefix(f"{after:,} "), change)
    return Figure("size", megabytes(size), change, f"{megabytes(size)}, {change}")


def _speed(facts: Facts) -> Figure | None:
    rows = timings_at_one_shape(facts)
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    if first is last:
        return Figure("speed", f"{last['median'] * 1e3:.1f} ms", f"at {shaped(last)}")
    ratio, than = first["median"] / last["median"], f"as fast as {first['candidate']}"
    took = f"{last['median'] * 1e3:.1f} ms where it takes {first['median'] * 1e3:.1f}, {shaped(last)}"
    if not is_clear(last, first):
        rounds = f"{last['ratio_p10']:.2f} to {last['ratio_p90']:.2f} times {than} round by round"
        detail = f"times scatter too much: {rounds}, {took} in the median; time them again on an idle machine"
        return Figure("speed", "not clear", detail, f"its speed is not clear ({detail})")
    figure = f"{ratio:.2f} times"
    return Figure("speed", figure, f"{than}: {took}", f"{figure} {than} ({took})")


def timings(facts: Facts) -> list[Mapping[str, Any]]:
    """What was timed, if it was: a row a candidate and shape; the first candidate is what the others are compared with,
    the last is what was made."""
    for name in ("benchmark", "bench"):
        section = facts.sections.get(name)
        if isinstance(section, Mapping) and section.get("timings"):
            return list(section["timings"])
    return []


def timings_at_one_shape(facts: Facts) -> list[Mapping[str, Any]]:
    """The timings at the middle shape, which represents all where only one is shown: neither the smallest nor the
    largest inputs."""
    timed = timings(facts)
    shapes = list(dict.fromkeys((row["batch"], row["length"]) for row in timed))
    return [row for row in timed if (row["batch"], row["length"]) == shapes[len(shapes) // 2]]


def is_clear(row: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether the ratio of the medians of ``row`` and ``first`` agrees with their ratios round by round, where both run
    under the same load. If it does not, the machine was busy, and the medians cannot be trusted."""
    return row["ratio_p10"] <= first["median"] / row["median"] <= row["ratio_p90"]


def shaped(row: Mapping[str, Any]) -> str:
    """The inputs of a timing, for people."""
    texts = f"{row['batch']} text{'s' if row['batch'] > 1 else ''}"
    return f"{texts} of {row['length']} tokens" if row["length"] else f"a batch of {row['batch']}"


def same_function(facts: Facts) -> Figure | None:
    """Whether what was made computes what was trained, as a comparison found; None where there was none."""
    parity = facts.sections.get("parity")
    if not isinstance(parity, Mapping) or "ok" not in parity:
        unproven = [step.name for step in facts.passes if step.proof.startswith("not checked")]
        if not unproven:
            return None
        reason = next(step.proof for step in facts.passes if step.proof.startswith("not checked"))
        return Figure("same function", "not checked", reason, f"{', '.join(unproven)} {reason}")
    summary = str(parity.get("summary", ""))
    if parity["ok"] is None:
        value = "approximate" if "quantized" in facts.sections else "not compared"
        return Figure("same function", value, summary, summary)
    found = parity.get("max_rel")
    if not parity["ok"] or not isinstance(found, (int, float)):
        return Figure("same function", "no", summary, summary)
    value = "no difference" if found == 0 else f"equal to {found:.1e}"
    what = {"tensors": "tensors", "blocks": "blocks"}.get(str(parity.get("checked")), "the trained model's outputs")
    return Figure("same function", value, f"of the scale of {what}", f"{value} of the scale of {what}")
