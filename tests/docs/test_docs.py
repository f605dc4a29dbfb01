"""Every block of code in the documentation runs as it stands, on small models; the site builds strictly.

The README's run in ``tests/whole/test_readme.py``, on real weights. What cannot run says why in its fence, ```` ```bash
no-run: needs a GPU ````, with one of the reasons below.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, SHELLS, blocks, commands, pages, run
from tests.docs.given import MADE_BY, Pages, given

#: Why a block may not run in a test; nothing else is left out.
EXCUSES = {
    "installs packages",
    "needs a GPU",
    "needs a clone and minutes",
    "needs onnxruntime-genai",
    "one line a command, each parsed",
    "as in the README",
}
PAGES = [page for page in pages()[1:] if any(block.excuse is None for block in blocks(page))]


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_table: Path) -> Pages:
    return Pages(tmp_path_factory.mktemp("docs"), tiny_checkpoint, tiny_table)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.filterwarnings("default")  # the converter's own, and what a reader's script would see
def test_every_block_of_a_page_runs(page: Path, ran: Pages) -> None:
    assert ran.run(page).is_dir()


def test_pages_begin_with_what_others_make() -> None:
    asked = {name for page in PAGES for name in given(page)}
    assert set(MADE_BY) <= asked


def test_what_is_as_in_the_readme_is_in_the_readme() -> None:
    readme, *others = ({block.text: block for block in blocks(page)} for page in pages())
    quoted = [block for page in others for block in page.values() if block.excuse == "as in the README"]
    assert quoted
    for block in quoted:
        assert block.text in readme, f"{block}: the README has another"


def test_what_is_left_out_has_one_of_the_reasons() -> None:
    for page in pages():
        for block in blocks(page):
            assert block.excuse is None or block.excuse in EXCUSES, f"{block}: {block.excuse!r} is no reason"


def test_no_reason_is_left_over() -> None:
    used = {block.excuse for page in pages() for block in blocks(page)}
    assert used - {None} == EXCUSES


def test_every_fence_names_what_it_is() -> None:
    """A block that nobody runs is plain text, so that no command hides in it."""
    plain = {"text", "json", "csv", "jsonl", "javascript"}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"^ *```([^`\n]*)$", text, re.MULTILINE)[::2]
        kinds = {name.split(" ")[0] for name in named}
        assert kinds <= {*plain, *SHELLS, "python", "toml"}, f"{page}: {kinds}"
        for body in re.findall(r"^ *```text\n(.*?)```", text, re.DOTALL | re.MULTILINE):
            assert not re.search(r"^(lorafx|pip|python) ", body, re.MULTILINE), f"{page}: {body}"


def test_a_planted_block_that_fails_is_named(tmp_path: Path) -> None:
    from tests.docs.blocks import Block

    with pytest.raises(AssertionError, match=r"here\.md:7: lorafx fold nothing -o out"):
        run(Block("here.md", 7, "bash", "lorafx fold nothing -o out\n"), {})
    with pytest.raises(AssertionError, match=r"here\.md:8"):
        run(Block("here.md", 8, "bash", "test -e nothing\n"), {})
    with pytest.raises(NameError):
        run(Block("here.md", 9, "python", "nothing\n"), {})


def test_comments_and_continued_lines_of_a_shell_block() -> None:
    text = "# first\nlorafx fold a \\\n  -o b   # then\n\nlorafx check b\n"
    assert commands(text) == [["lorafx", "fold", "a", "-o", "b"], ["lorafx", "check", "b"]]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in pages()[1:]:
        html = (tmp_path / "site" / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        asked = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://[^\"> ]*", html)
        assert not asked, f"{page}: asks another host for {asked}"
        assert "arithmatex" not in html, f"{page}: a formula was left as text"
        assert ":func:" not in html, f"{page}: a role of another markup was left as text"
        assert ":class:" not in html, f"{page}: a role of another markup was left as text"
        assert "no-run" not in html, f"{page}: what is for the tests is shown"
