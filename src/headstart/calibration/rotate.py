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
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from headstart.calibration.moments import ROWS_AT_ONCE, norm_before, rms_norms_of, writing_norms
from headstart.model.architecture import Architecture
from headstart.model.axes import dimensions_of
from headstart.model.checkpoint import Checkpoint, copy_files, write_checkpoint
from headstart.model.families import DROPPED
from headstart.system.errors import UserError


def rotation_obstacle(architecture: Architecture) -> str:
    """Why the residual stream of a model cannot be rotated, in words; empty if it can."""
    for pattern, layout in architecture.layouts.items():
        if layout != "embed" or not pattern.endswith(".weight"):
            continue
        if pattern not in rms_norms_of(architecture):
            return f"its {pattern} is a LayerNorm's, which subtracts the mean over channels"
        if pattern in writing_norms(architecture):
            return f"its {pattern} scales channels on their way into the residual stream"
    return ""


def check_rotates(architecture: Architecture) -> None:
    """Raise a UserError if a teacher's residual stream cannot be rotated."""
    if obstacle := rotation_obstacle(architecture):
        raise UserError(
            f"a {architecture.family.name} teacher cannot be rotated: {obstacle}; choose "
            "init least_squares instead"
        )


def rotated_architecture(teacher: Architecture) -> Architecture:
    """The architecture of a rotated teacher, whose embeddings are not tied.

    Raises:
        UserError: the family's residual stream cannot be rotated.
    """
    check_rotates(teacher)
    config = copy.deepcopy(teacher.config)
    config.tie_word_embeddings = False
    return Architecture.of(config)


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
    state: Mapping[str, Tensor],
    architecture: Architecture,
    basis: Float[Tensor, "embed components"],
) -> Iterator[tuple[str, Tensor]]:
    """A teacher's tensors in another basis of the residual stream.

    Args:
        state: all of the teacher's tensors, by name.
        architecture: the teacher's.
        basis: orthogonal; its columns are the new channels.

    Yields:
        (name, tensor) pairs of a teacher of `rotated_architecture`, computed in float64.

    Raises:
        UserError: the family's residual stream cannot be rotated, or a tensor matches no rule.
    """
    family, layouts = architecture.family, rotated_architecture(architecture).layouts
    norms = norm_before(architecture)
    untied = [reader for reader in norms if reader not in architecture.layouts]
    for name, tensor in state.items():
        rule, layer = architecture.match(name)
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


def write_rotated(
    teacher: Checkpoint, basis: Float[Tensor, "embed components"], folder: Path
) -> None:
    """Write a teacher in an orthogonal basis of its residual stream, and the basis beside it.

    Args:
        teacher: its weights are written in its precision, with config and tokenizer.
        basis: its columns are the new channels.
        folder: exists, and is what `read_rotated` reads.

    Raises:
        UserError: the family's residual stream cannot be rotated.
    """
    save_file({"basis": basis.contiguous()}, folder / "basis.safetensors")
    rotated = folder / "teacher"
    rotated.mkdir()
    tensors = dict(rotated_tensors(dict(teacher.tensors()), teacher.architecture, basis))
    write_checkpoint(rotated, tensors, rotated_architecture(teacher.architecture).config)
    copy_files(teacher.folder, rotated)


def read_rotated(folder: Path) -> tuple[Checkpoint, Float[Tensor, "embed components"]]:
    """What `write_rotated` wrote: the teacher in another basis, and the basis."""
    basis = load_file(folder / "basis.safetensors")["basis"]
    return Checkpoint.open(folder / "teacher"), basis
