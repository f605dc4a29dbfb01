"""PEFT's own test suite as a judge: each of its cases captured, folded and compared with the unmerged model.

    python benchmarks/peft_suite.py --results peft.jsonl              # all of them, resumed where it stopped
    python benchmarks/peft_suite.py --only OFT --only "Vanilla MLP 1 LoRA"
    python benchmarks/peft_suite.py --results peft.jsonl --table docs/peft.md

The cases are those of ``tests/test_custom_models.py`` in the sdist of the PEFT that is installed, downloaded into a
temporary folder for the run (AdaMSS needs scikit-learn). Adapters are initialised as PEFT's merge tests do it, then
every trained parameter is moved, so that none is zero; all is computed in fp64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch

from benchmarks.peft_judge import Finding, examine, trained, widened
from lorafx.errors import first_line

_PACKAGE = "peft_suite_tests"
#: Why cases of a kind do not fold, where neither PEFT nor what is left in the graph says it.
NOTES = {
    "Lily": "Lily's routers weigh its parts by the input, which no weight does.",
    "Lora": "On a convolution of several groups the first half of LoRA reads the channels of all of them, a weight "
    "those of its own group alone.",
    "OFT": "On convolutions OFT rotates patches and adds them up to an image again, in an order that is that of the "
    "patches only where an image is a single patch: with more of them, PEFT's merged model computes something else "
    "than its unmerged one. The cases kept have images of one patch, which their graph, of free sizes, does not say.",
}
VERDICTS = ("exact", "by nature", "kept", "refused", "wrong", "not built")


@contextmanager
def suite() -> Iterator[Any]:
    """The module of PEFT's cases; gone with its folder afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"peft=={peft.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, wanted, "--dest", folder], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (tests,) = Path(folder).glob("peft-*/tests")
        yield _imported(tests)


def _imported(tests: Path) -> Any:
    package: Any = types.ModuleType(_PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[_PACKAGE] = package
    # Of diffusers the suite's shared part wants one class, for tests that are none of these.
    absent: Any = types.ModuleType("diffusers")
    absent.StableDiffusionPipeline = None
    sys.modules.setdefault("diffusers", absent)
    return importlib.import_module(f"{_PACKAGE}.test_custom_models")


def inputs_of(module: Any, name: str) -> list[dict[str, torch.Tensor]]:
    """The suite's input and a random one of its shape; of numbers where the model takes numbers, not tokens."""
    (given,) = module.TestPeftCustomModel.prepare_inputs_for_testing(types.SimpleNamespace(torch_device="cpu")).values()
    tokens = torch.randint(0, 100, given.shape, generator=torch.Generator().manual_seed(0))
    return [{"X": value if name.startswith("Emb") else value.double()} for value in (given, tokens)]


def judged(module: Any, case: Sequence[Any]) -> Finding:
    """What comes of one case: its title, model, config class and options."""
    title, name, kind, options = case
    found = Finding(title, kind.__name__.removesuffix("Config"), name)
    try:
        base = widened(module.MockTransformerWrapper.from_pretrained(name))
        config = kind(base_model_name_or_path=name, **module.set_init_weights_false(kind, options))
        torch.manual_seed(1)
        inside = peft.get_peft_model(module.MockTransformerWrapper.from_pretrained(name), config)
        model = trained(widened(inside))
    except Exception as error:  # each kind has needs of its own
        found.verdict, found.reason = "not built", first_line(error)
        return found
    return examine(found, model, base, inputs_of(module, name))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """The findings as Markdown."""
    rows = list(rows)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        kinds[row["kind"]][row["verdict"]] += 1
    both = [row for row in rows if row["verdict"] == "exact" and row["merged"] is not None]
    better = sum(row["error"] <= row["merged"] for row in both)
    total = Counter(row["verdict"] for row in rows)
    lines = [
        f"# PEFT's own suite ({peft.__version__})",
        "",
        f"{len(rows)} cases of {len(kinds)} kinds: " + ", ".join(f"{total[v]} {v}" for v in VERDICTS if total[v]) + ".",
        f"Of {len(both)} that PEFT merges, too, {better} have at most the error of its merge; the others differ from "
        "it by rounding.",
        "",
        "| kind | cases | folds exactly | cannot merge by nature | kept | refused | wrong | not built |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, counts in sorted(kinds.items(), key=lambda item: item[0].lower()):
        lines.append(f"| {kind} | {counts.total()} | " + " | ".join(str(counts[v] or "") for v in VERDICTS) + " |")
    others = [row for row in rows if row["verdict"] != "exact"]
    left = {row["kind"] for row in others if row["verdict"] in ("kept", "by nature")}
    lines += [f"\n{note}" for kind, note in NOTES.items() if kind in left]
    if others:
        lines += ["", "| case | verdict | why |", "|---|---|---|"]
        lines += [f"| {row['kind']}: {row['title']} | {row['verdict']} | {_cell(row['reason'])} |" for row in others]
    return "\n".join(lines) + "\n"


def _cell(reason: str) -> str:
    # Paths of this machine's packages do not belong in the page.
    return re.sub(r"/\S*site-packages/", "", reason).replace("|", "/")


def known(file: Path | None) -> dict[str, dict[str, Any]]:
    """The findings a file holds, by the number of their case; the last one of each counts."""
    if file is None or not file.exists():
        return {}
    return {row["case"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def sweep(only: Sequence[str], file: Path | None) -> None:
    """Judge the cases that ``only`` names by kind or title (all, when empty), and append each finding to the file."""
    done = {} if only else known(file)
    with suite() as module:
        for number, case in enumerate(module.TEST_CASES):
            named = {case[0], case[2].__name__.removesuffix("Config")}
            if str(number) in done or (only and not named & set(only)):
                continue
            row = {"case": str(number), **judged(module, case).to_json()}
            print(f"{row['verdict']:9} {row['kind']}: {row['title']} {row['seconds']} s {row['reason']}", flush=True)
            if file is not None:
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this kind or case (again)")
    parser.add_argument("--results", type=Path, help="JSON lines; cases in it are not run again")
    parser.add_argument("--table", type=Path, help="write the results as Markdown")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sweep(options.only, options.results)
    if options.table is not None:
        options.table.write_text(table(known(options.results).values()), encoding="utf-8")


if __name__ == "__main__":
    main()
