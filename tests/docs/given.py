"""What pages begin with: small random models, tables, and what other pages make, under the names that pages use.

A page names them in its front matter (``given: [all-MiniLM-L6-v2, train.csv]``), and its blocks run in a folder that
holds these and nothing else.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from examples import assets
from tests import foreign
from tests.docs.blocks import ROOT, blocks, run

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: What a tutorial leaves behind, and other pages go on with.
MADE_BY = {
    **dict.fromkeys(("run", "folded", "onnx"), "tutorials/classification.md"),
    "decoder": "tutorials/language-model.md",
}
_SPECIAL = ["<pad>", "</s>", "<unk>"]
_STARTS: dict[str, Any] = {"decoder_start_token_id": 0}
_SIZES: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "eos_token_id": 1}


def given(page: Path) -> list[str]:
    """What a page says that it begins with."""
    text = page.read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        return []
    return yaml.safe_load(text.split("---\n")[1]).get("given", [])


class Pages:
    """Runs pages below ``home``, each once, and makes what they begin with, each once."""

    def __init__(self, home: Path, encoder: Path, table: Path):
        self.home = home
        self.table = table
        self.ran: dict[Path, Path] = {}
        self.makers: dict[str, Callable[[Path], Any]] = {
            "all-MiniLM-L6-v2": lambda path: shutil.copytree(encoder, path),
            "SmolLM2": self._decoder,
            "t5-small": self._encoder_decoder,
            "adapter": self._adapter,
            "train.csv": lambda path: _write(path, self._rows(1, 49)),
            "test.csv": lambda path: _write(path, self._rows(49, 65)),
            "texts.csv": lambda path: _write(path, self._texts()),
            "chats.jsonl": lambda path: _write(path, _chats()),
            "pairs.csv": lambda path: _write(path, _pairs()),
            "digits": _digits,
        }

    def run(self, page: Path) -> Path:
        """The folder that a page's blocks ran in, one after the other, as one reader types them."""
        if page not in self.ran:
            folder = self.home / "pages" / page.relative_to(ROOT).with_suffix("")
            folder.mkdir(parents=True)
            for name in given(page):
                source = self.make(name)
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
            with _inside(folder):
                names: dict[str, Any] = {"__name__": "docs"}
                for block in blocks(page):
                    if block.excuse is None:
                        run(block, names)
            self.ran[page] = folder
        return self.ran[page]

    def make(self, name: str) -> Path:
        """The thing called ``name``, made when it is asked for first."""
        if name in MADE_BY:
            return self.run(ROOT / "docs" / MADE_BY[name]) / name
        path = self.home / name
        if not path.exists():
            self.makers[name](path)
        return path

    def _rows(self, first: int, last: int) -> list[str]:
        lines = self.table.read_text(encoding="utf-8").splitlines()
        return [lines[0], *lines[first:last]]

    def _texts(self) -> list[str]:
        return ["text", *(line.rpartition(",")[0] for line in self._rows(1, 33)[1:])]

    def _decoder(self, path: Path) -> None:
        ends: dict[str, Any] = {**_SIZES, "bos_token_id": None, "num_hidden_layers": 1, "max_position_embeddings": 256}
        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = hf.LlamaConfig(hidden_size=32, intermediate_size=64, tie_word_embeddings=True, **ends, **heads)
        _save(hf.LlamaForCausalLM, config, path)
        tokenizer = _bytes(ends_texts=False)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(path)

    def _encoder_decoder(self, path: Path) -> None:
        sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        config = hf.T5Config(**_SIZES, **sizes, **_STARTS)
        _save(hf.T5ForConditionalGeneration, config, path)
        _bytes(ends_texts=True).save_pretrained(path)

    def _adapter(self, path: Path) -> None:
        base = hf.AutoModelForCausalLM.from_pretrained(self.make("SmolLM2"))
        options = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        foreign.save(foreign.adapted(base, options), path)


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """As a reader's session begins in a folder of their own: modules that are saved there can be imported."""
    torch.manual_seed(0)
    sys.path.insert(0, str(folder))
    try:
        with chdir(folder):
            yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
                del sys.modules[name]


def _save(kind: Any, config: Any, path: Path) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        kind(config).save_pretrained(path)


def _bytes(ends_texts: bool) -> Any:
    """A tokenizer of bytes, which has a token for every text; ``ends_texts`` as T5's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*_SPECIAL, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if ends_texts:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    kinds: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=256, model_input_names=["input_ids", "attention_mask"], **kinds
    )


def _chats() -> list[str]:
    asked = [("What is the capital of France?", "Paris."), ("And of Italy?", "Rome."), ("Who are you?", "A model.")]
    rows = [
        {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": said}]}
        for user, said in asked * 4
    ]
    return [json.dumps(row) for row in rows]


def _digits(path: Path) -> None:
    """The first images of each class."""
    for part in assets.digits():
        for number in sorted(part.iterdir()):
            for file in sorted(number.iterdir())[:3]:
                (path / part.name / number.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, path / part.name / number.name)


def _pairs() -> list[str]:
    words = [("one cat", "eine Katze"), ("two dogs", "zwei Hunde"), ("a house", "ein Haus"), ("the sea", "das Meer")]
    return ["text,label", *(f"translate English to German: {text},{label}" for text, label in words * 4)]


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
