"""Sweep transformers' model families: which are exact, which are refused and why.

    python benchmarks/families.py --results families.jsonl            # all of them, resumed where it stopped
    python benchmarks/families.py --only mamba --only jamba
    python benchmarks/families.py --results families.jsonl --table docs/families.md

Each family runs in a process of its own with a time limit, so that one that hangs or dies counts as such.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are forked; a pool of threads does not survive that
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lorafx
from benchmarks.family_checks import STAGES, Verdict, examine
from benchmarks.family_models import FAMILIES, build
from lorafx.passes.lora import Lora

#: Every fourth family goes to ONNX.
_ONNX_EVERY = 4


def goes_to_onnx(name: str) -> bool:
    """Whether a family is among those exported."""
    return list(FAMILIES).index(name) % _ONNX_EVERY == 0


def stages_of(name: str) -> tuple[str, ...]:
    """What is checked on a family."""
    return STAGES if goes_to_onnx(name) else tuple(stage for stage in STAGES if stage != "onnx")


def _work(name: str, stages: Sequence[str], end: Any) -> None:
    warnings.simplefilter("ignore")
    end.send(examine(name, FAMILIES[name], stages).to_json())


def judged(name: str, limit: float, stages: Sequence[str]) -> dict[str, Any]:
    """The verdict on one family, from a process of its own."""
    started = time.perf_counter()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, stages, there))
    process.start()
    there.close()
    result = Verdict(name, verdict="crash").to_json()
    try:
        if here.poll(limit):
            result = here.recv()
        else:
            result["reason"] = f"not done after {limit:.0f} s"
    except EOFError:
        process.join()
        result["reason"] = f"the process died with exit code {process.exitcode}"
    if process.is_alive() and result["reason"].startswith("not done"):
        process.kill()
    process.join()
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def warm_up() -> None:
    """Import and run once what every family needs, so that the processes to come start with it."""
    family = FAMILIES["bert"]
    program = lorafx.capture(build(family))
    lorafx.fold(lorafx.rewrite(program, [Lora(rank=2)]))


def known(file: Path | None) -> dict[str, dict[str, Any]]:
    """The results a file holds; the last one of each family counts."""
    if file is None or not file.exists():
        return {}
    return {row["family"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as Markdown."""
    counts = Counter(row["verdict"] for row in results.values())
    lines = ["# Model families", ""]
    lines += [
        f"{len(results)} families: "
        + ", ".join(f"{counts[v]} {v}" for v in ("exact", "refused", "crash", "differs"))
        + ".",
        "",
    ]
    lines += ["| family | model | verdict | why |", "|---|---|---|---|"]
    for name, row in sorted(results.items()):
        why = f"{row['stage']}: {row['reason']}" if row["verdict"] != "exact" else ""
        why = re.sub(r"/\S*site-packages/", "", why)  # paths of this machine's packages do not belong in the page
        lines.append(f"| {name} | {row['model']} | {row['verdict']} | {why.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def sweep(names: Iterable[str], file: Path | None, jobs: int, limit: float, stages: Sequence[str]) -> None:
    """Judge families, a few at a time, and append each result to the file."""

    def one(name: str) -> None:
        row = judged(name, limit, stages or stages_of(name))
        line = f"{row['verdict']:8} {name} {row['seconds']} s"
        if row["verdict"] != "exact":
            line += f" · {row['stage']}: {row['reason']} {row['where']}"
        print(line, flush=True)
        if file is not None:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")

    warm_up()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, names))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this family (again for more)")
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds a family may take")
    parser.add_argument("--results", type=Path, help="JSON lines; families in it are not run again")
    parser.add_argument("--table", type=Path, help="write the results as Markdown")
    parser.add_argument("--stage", action="append", choices=STAGES, help="check this alone (again for more)")
    options = parser.parse_args()
    unknown = set(options.only or ()) - FAMILIES.keys()
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    done = {} if options.only else known(options.results)
    names = [name for name in options.only or FAMILIES if name not in done]
    sweep(names, options.results, options.jobs, options.limit, options.stage or ())
    if options.table is not None:
        options.table.write_text(table(known(options.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
