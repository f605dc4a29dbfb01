"""Twenty counterfactual edits of SmolLM2-135M-Instruct, one at a time: what they teach, and what else they change.

    python -m benchmarks.edits

Each edit starts from the checkpoint and gives a patch, which is applied to the checkpoint's folder and reverted; the
sha256 of the weights' file must then be the checkpoint's. ``--paper`` edits with the settings of RoseLoRA's own code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from examples import assets

if TYPE_CHECKING:
    from lorafx.editing.edit import EditResult
    from lorafx.editing.patch import Patch

HERE = Path(assets.__file__).parent
WEIGHTS = "model.safetensors"


def main() -> None:
    """Make the edits and print the table."""
    from lorafx.editing.edit import edit
    from lorafx.editing.requests import PAPER, EditOptions, read_edits

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edits", type=Path, default=HERE / "edits.jsonl")
    parser.add_argument("--prompts", type=Path, default=HERE / "unrelated_prompts.txt", help="one a line")
    parser.add_argument("--paper", action="store_true", help="the settings of RoseLoRA's own code")
    parser.add_argument("--out", type=Path, help="write the result here too, as JSON")
    given = parser.parse_args()
    checkpoint = assets.smollm2()
    result = edit(
        checkpoint,
        read_edits(given.edits),
        prompts=given.prompts.read_text(encoding="utf-8").splitlines(),
        sequential=False,
        options=PAPER if given.paper else EditOptions(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    back = [restores(checkpoint, patch) for patch in result.patches]
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**result.to_json(), "reverted": back}, indent=2), encoding="utf-8")
    print(table(result, back))


def restores(checkpoint: Path, patch: Patch) -> bool:
    """Whether a folder with the patch applied is another one, and with it reverted the very same, by sha256."""
    from lorafx.editing.patch_folder import apply, revert
    from lorafx.files.folder import file_hash

    with tempfile.TemporaryDirectory() as place:
        edited, back = Path(place, "edited"), Path(place, "back")
        apply(checkpoint, patch, edited)
        revert(edited, patch, back)
        before, during, after = (file_hash(folder / WEIGHTS) for folder in (checkpoint, edited, back))
    return before == after != during


def table(result: EditResult, back: list[bool]) -> str:
    """Markdown: a line for each edit, and one for all."""
    lines = ["| edit | success | paraphrases | unrelated kept | changed | share | s | revert restores every byte |"]
    lines.append("|---|---|---|--:|--:|--:|--:|---|")
    for outcome, restored in zip(result.outcomes, back, strict=True):
        row = outcome.row()
        cells = [row["edit"], _yes(outcome.success), row["paraphrases"], row["locality"], f"{row['changed']:,}"]
        lines.append("| " + " | ".join([*cells, row["share"], f"{row['seconds']:.1f}", _yes(restored)]) + " |")
    total = result.summary()
    kept = f"{total['locality']:.1%} (lowest {total['lowest_locality']:.0%})"
    cells = [f"all {len(back)}", f"{total['success']:.0%}", f"{total['paraphrase_success']:.0%}", kept]
    cells += [f"at most {total['changed']:,}", f"at most {total['share']:.3%}", f"{total['seconds']:.0f}"]
    return "\n".join([*lines, "| " + " | ".join([*cells, _yes(all(back))]) + " |"])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


if __name__ == "__main__":
    main()
