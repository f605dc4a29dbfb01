"""Judge many random graphs: ``python -m tests.random_graphs --count N --start SEED --jobs J --log FILE``.

One line of JSON a graph goes to the log; a seed that stands there is not judged again. Failures are printed minimised.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from tests.judge.judge import draw, judge
from tests.judge.minimise import described, minimise

#: What must not be found.
FAILURES = ("mismatch", "crash", "warned")
#: A worker is replaced after so many graphs: what the tracer keeps of each adds up.
_GRAPHS_A_WORKER = 200


def _one(given: tuple[int, str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    seed, stage = given
    return {"seed": seed, **dataclasses.asdict(judge(draw(seed), stage))}


def failure(seed: int) -> str:
    """The smallest graph that fails as the graph of ``seed`` does, as text."""
    plan = draw(seed)
    verdict = judge(plan)
    small = minimise(plan, verdict)
    again = judge(small)
    return f"# {again.kind} in {again.stage}: {again.what}\n{described(small)}"


def summary(rows: list[dict[str, Any]]) -> str:
    """One line: how many graphs, and what was found."""
    kinds = collections.Counter(row["kind"] for row in rows)
    judged = [row for row in rows if row["kind"] != "refused"]
    plain, gated = sum(row["removed"] > 0 for row in judged), sum(row["gated"] > 0 for row in judged)
    share = sum(row["removed"] for row in judged) / max(1, sum(row["parameters"] for row in judged))
    return (
        f"{len(rows)} graphs: {kinds['mismatch']} mismatches, {kinds['crash']} crashes, {kinds['refused']} refused; "
        f"something removed in {plain} (after gates in {gated}) of {len(judged)}, {share:.1%} of the parameters; "
        f"{sum(row['branches'] > 0 for row in judged)} with a branch taken out; "
        f"{sum(bool(row['warned']) for row in judged)} with a rule caught being wrong; "
        f"{sum(row['outside'] > 0 for row in judged)} hold for some of the sizes alone; "
        f"{sum(row['seconds'] for row in rows) / max(1, len(rows)):.2f} s a graph"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge random graphs.")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--stage", default="", help="hold the graphs to this stage alone, such as 'folded = eager'")
    parser.add_argument("--show", type=int, nargs="*", help="minimise and print these seeds, and do nothing else")
    given = parser.parse_args()
    if given.show is not None:
        for seed in given.show:
            print(failure(seed), flush=True)
        return 0
    known = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    rows = [json.loads(line) for line in known]
    done = {row["seed"] for row in rows}
    seeds = [seed for seed in range(given.start, given.start + given.count) if seed not in done]
    context = multiprocessing.get_context("spawn")
    with context.Pool(given.jobs, maxtasksperchild=_GRAPHS_A_WORKER) as pool:
        for row in pool.imap_unordered(_one, [(seed, given.stage) for seed in seeds]):
            rows.append(row)
            if given.log:
                with given.log.open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if row["kind"] in FAILURES:
                print(f"seed {row['seed']}: {row['kind']} in {row['stage']}: {row['what']}", flush=True)
            if len(rows) % 500 == 0:
                print(summary(rows), flush=True)
    print(summary(rows))
    return int(any(row["kind"] in FAILURES for row in rows))


if __name__ == "__main__":
    sys.exit(main())
