"""A pass in a package of its own is installed with pip and then is a pass like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.plugin_install import install

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, sys, tomllib
import torch
import lorafx
from lorafx.parity.promises import VerifyEach
from lorafx.recipes.recipe import Recipe
from lorafx.recipes.registry import known, pass_class, summary
from tests.zoo import build

base = build("bert")
base.save_pretrained(sys.argv[1] + "/base")
captured = lorafx.capture(sys.argv[1] + "/base")
recipe = Recipe.parse(tomllib.loads('[[pass]]\\nname = "ia3"\\npull = 0.5\\n[[pass]]\\nname = "lora"\\nrank = 2\\n'))
program = lorafx.rewrite(captured, recipe)
step_zero = lorafx.verify(captured, program)
generator = torch.Generator().manual_seed(0)
for name in program.names("adapter"):
    program.tensor(name).data.add_(0.3 * torch.randn(program.tensor(name).shape, generator=generator))
model = program.module()
penalty = model.penalty()
penalty.backward()
program.save(sys.argv[1] + "/run")
again = lorafx.load(sys.argv[1] + "/run")
# In fp64, to 1e-12: these random adapters amplify fp32 rounding past the tolerance of a trained model.
folded = lorafx.fold(again, [VerifyEach(double=True)])
print(json.dumps({
    "known": dict(known()),
    "summary": summary("ia3"),
    "class": pass_class("ia3").__module__,
    "sites": [inserted.module for inserted in program.history[0].inserted],
    "step_zero": step_zero.max_abs,
    "penalty": float(penalty),
    "gradients": sum(value.grad is not None for value in program.trainable().values()),
    "folded": len(folded.history) > len(again.history),
    "names": sorted(folded.roles) == sorted(captured.roles),
    "peft": json.loads(open(sys.argv[1] + "/run/lorafx.json").read())["meta"]["peft"],
}))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process that has the plug-in finds."""
    folder = tmp_path_factory.mktemp("plugin")
    site = install(folder)
    places = os.pathsep.join(map(str, (site, ROOT)))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_listed_without_being_imported(result: dict[str, Any]) -> None:
    assert result["known"]["ia3"] == "lorafx_ia3.ia3:Ia3"
    assert result["known"]["lora"] == "lorafx.passes.lora"
    assert result["summary"] == "plug-in lorafx_ia3.ia3:Ia3"
    assert result["class"] == "lorafx_ia3.ia3"


def test_it_rewrites_trains_and_folds(result: dict[str, Any]) -> None:
    blocks = [f"bert.encoder.layer.{block}" for block in range(2)]
    ends = ["attention.self.key", "attention.self.value", "output.dense"]
    assert sorted(result["sites"]) == [f"{block}.{end}" for block in blocks for end in ends]
    assert result["step_zero"] == 0.0
    assert result["penalty"] > 0
    assert result["gradients"] == len(result["sites"])
    assert result["folded"]
    assert result["names"], "folding leaves the tensors of the base model and no others"


def test_a_run_with_it_says_that_peft_cannot_open_it(result: dict[str, Any]) -> None:
    assert result["peft"] == "ia3 inserted what PEFT's LoRA does not have"
