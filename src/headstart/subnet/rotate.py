"""Rotation: a teacher whose first residual channels are the principal components of its stream.

An orthogonal change of basis Q of the residual stream changes nothing that an RMSNorm model
computes, once the norms' gains are multiplied into the layers that read them: |Q^T x| = |x|. With
Q from the principal components of the normalised stream, most of what is there lies in the first
channels, and "the first k channels" is the best basis to cut the width in. What comes out is an
ordinary checkpoint of the same family, so counting, search and extraction know nothing of it.

Tied embeddings become untied: as the input matrix E turns into E Q and the output matrix, with the
last norm's gains g, into E diag(g) Q, they are no longer one matrix.

Source: SliceGPT (arXiv 2401.15024), section 3, with one Q for all layers, since a stock checkpoint
has no place between them for another rotation.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from headstart.subnet.axes import dimensions_of
from headstart.subnet.extract import TOKENIZER_FILES, read_tensors
from headstart.subnet.families import DROPPED
from headstart.subnet.rules import family_of, layouts_of, match_tensor, read_config
from headstart.subnet.statistics import rms_norms_of, writing_norms

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS_AT_ONCE = 8192
"""Of a matrix in float64, which an embedding would otherwise be as a whole."""


def rotation_obstacle(config: PreTrainedConfig) -> str:
    """Why the residual stream of a model cannot be rotated, in words; empty if it can."""
    for pattern, layout in layouts_of(config).items():
        if layout != "embed" or not pattern.endswith(".weight"):
            continue
        if pattern not in rms_norms_of(config):
            return f"its {pattern} is a LayerNorm's, which subtracts the mean over channels"
        if pattern in writing_norms(config):
            return f"its {pattern} scales channels on their way into the residual stream"
    return ""


def check_rotates(config: PreTrainedConfig) -> None:
    """Find out whether a teacher's residual stream can be rotated.

    Raises:
        ValueError: it cannot.
    """
    if obstacle := rotation_obstacle(config):
        raise ValueError(
            f"a {family_of(config).name} teacher cannot be rotated: {obstacle}; choose "
            "init least_squares instead"
        )


def rotated_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a rotated teacher, whose embeddings are not tied.

    Raises:
        ValueError: the family's residual stream cannot be rotated.
    """
    check_rotates(config)
    rotated = copy.deepcopy(config)
    rotated.tie_word_embeddings = False
    return rotated


def principal_basis(moment: Float[Tensor, "embed embed"]) -> Float[Tensor, "embed components"]:
    """The principal components of a second moment as columns, largest first.

    Their signs are chosen so that each component's largest number is positive.
    """
    basis: Tensor = torch.linalg.eigh(moment)[1].flip(dims=(1,))
    largest = basis.abs().argmax(dim=0)
    signed: Tensor = basis * basis.gather(0, largest[None]).sign()
    return signed


@torch.no_grad()
def rotated_tensors(
    state: Mapping[str, Tensor], config: PreTrainedConfig, basis: Float[Tensor, "embed components"]
) -> Iterator[tuple[str, Tensor]]:
    """A teacher's tensors in another basis of the residual stream.

    Args:
        state: all of the teacher's tensors, by name.
        config: the teacher's config.
        basis: orthogonal; its columns are the new channels.

    Yields:
        (name, tensor) pairs of a teacher with `rotated_config`, computed in float64.

    Raises:
        ValueError: the family's residual stream cannot be rotated, or a tensor matches no rule.
    """
    family, layouts = family_of(config), layouts_of(rotated_config(config))
    norms = {reader: norm for norm, all in family.readers.items() for reader in all}
    untied = [reader for reader in norms if reader not in layouts_of(config)]
    for name, tensor in state.items():
        rule, layer = match_tensor(name, config)
        if rule.layout == DROPPED:
            continue
        of_rows, *of_columns = dimensions_of(layouts[rule.pattern])
        if rule.pattern in norms:
            gains = state[norms[rule.pattern].format(i=layer)]
            yield name, _rows_in_basis(tensor, basis, gains)
        elif of_columns == [("embed",)]:
            yield name, _rows_in_basis(tensor, basis)
            for output in untied:
                yield output, _rows_in_basis(tensor, basis, state[norms[output]])
        elif of_rows == ("embed",) and rule.pattern in family.readers:
            yield name, torch.ones_like(tensor)
        elif of_rows == ("embed",):
            yield name, (basis.T @ tensor.to(basis.dtype)).to(tensor.dtype)
        else:
            yield name, tensor


def _rows_in_basis(
    matrix: Float[Tensor, "rows embed"],
    basis: Float[Tensor, "embed components"],
    gains: Float[Tensor, " embed"] | None = None,
) -> Float[Tensor, "rows components"]:
    """What multiplies the stream, maybe after a norm's gains, in the stream's new basis."""
    if gains is not None:
        basis = gains.to(basis.dtype)[:, None] * basis
    result = torch.empty(len(matrix), basis.shape[1], dtype=matrix.dtype)
    for first in range(0, len(matrix), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        result[rows] = matrix[rows].to(basis.dtype) @ basis
    return result


def write_rotated(teacher: Path, basis: Float[Tensor, "embed components"], folder: Path) -> None:
    """Write a teacher in another basis of its residual stream, as an ordinary checkpoint.

    Args:
        teacher: folder of its checkpoint.
        basis: orthogonal; its columns are the new channels.
        folder: exists, and receives weights in the teacher's precision, config and tokenizer.

    Raises:
        ValueError: the family's residual stream cannot be rotated.
    """
    from huggingface_hub import save_torch_state_dict

    config = read_config(teacher)
    state = dict(read_tensors(teacher))
    rotated = dict(rotated_tensors(state, config, basis))
    save_torch_state_dict(rotated, folder, metadata={"format": "pt"})
    rotated_config(config).save_pretrained(folder)
    for pattern in TOKENIZER_FILES:
        for file in teacher.glob(pattern):
            shutil.copyfile(file, folder / file.name)
