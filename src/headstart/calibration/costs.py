"""FLOPs of what calibration does: passes through layers, products of activations, linear systems.

A product of matrices costs two per multiplication. A linear system of n unknowns and m right sides
costs n^3 / 3 for its Cholesky factor and 2 n^2 m for the solutions, and the eigenvectors of a
symmetric matrix 9 n^3 (Golub and Van Loan, Matrix Computations, sections 4.2 and 8.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headstart.calibration.activations import can_propagate, groups_of, reads_stream
from headstart.calibration.moments import has_bias, sources_of, stream_norms
from headstart.model.architecture import Architecture
from headstart.model.axes import Sizes, axes_of, dimensions_of, shape_of
from headstart.model.count import layers_flops_per_token
from headstart.model.shapes import attention_width, sizes_in_layer


def statistics_flops(architecture: Architecture, num_blocks: int, block_length: int) -> int:
    """Of `collect_statistics`: a pass through the teacher's layers, and products of activations."""
    layouts, sizes = architecture.layouts, architecture.sizes
    forward: int = layers_flops_per_token(layouts, sizes, block_length)
    products = 0
    for pattern in set(sources_of(architecture).values()) | stream_norms(architecture):
        repeats = sizes["layers"] if "{i}" in pattern else 1
        products += repeats * shape_of(layouts[pattern], sizes)[-1] ** 2
    return int(forward + 2 * products) * num_blocks * block_length


def rotation_flops(teacher: Architecture) -> int:
    """Of `principal_basis` and `rotated_tensors`."""
    sizes, embed = teacher.sizes, teacher.sizes["embed"]
    rotated = 0
    for pattern, layout in teacher.layouts.items():
        if len(dimensions_of(layout)) == 2 and "embed" in axes_of(layout):
            rows, columns = shape_of(layout, sizes)
            rotated += rows * columns * (sizes["layers"] if "{i}" in pattern else 1)
    if teacher.config.tie_word_embeddings:  # the output matrix becomes one of its own
        rotated += sizes["vocab"] * embed
    return int(9 * embed**3 + 2 * rotated * embed)


def slice_refit_flops(
    teacher: Architecture, student_sizes: Mapping[str, Any], is_rotated: bool = False
) -> int:
    """Of `refitted`, for a student of these sizes.

    Args:
        teacher: what it is cut out of.
        student_sizes: a tuple gives a size for each layer.
        is_rotated: whether moments are turned to the teacher's basis as they are read.
    """
    layouts, sources = teacher.layouts, sources_of(teacher)
    of_stream = stream_norms(teacher)
    turning = 4 * teacher.sizes["embed"] ** 3 if is_rotated else 0

    def of_place(pattern: str, sizes: Sizes) -> int:
        if pattern in of_stream:  # a norm's scale is read off the same moments
            return turning
        if pattern not in sources:
            return 0
        rows, kept = shape_of(layouts[pattern], sizes)
        removed = shape_of(layouts[pattern], teacher.sizes)[1] - kept
        if not removed:
            return 0
        turned = turning if sources[pattern] in of_stream else 0
        return turned + _solve_flops(kept, removed) + 2 * rows * removed * kept

    in_layers = [pattern for pattern in layouts if "{i}" in pattern]
    flops = sum(of_place(pattern, student_sizes) for pattern in layouts if "{i}" not in pattern)
    for layer in range(student_sizes["layers"]):
        sizes = sizes_in_layer(student_sizes, layer)
        flops += sum(of_place(pattern, sizes) for pattern in in_layers)
    return flops


def propagation_flops(
    teacher: Architecture, student_sizes: Mapping[str, Any], num_blocks: int, block_length: int
) -> int:
    """Of a refit beside a teacher that is computed for it alone."""
    teacher_pass = teacher_pass_flops(teacher, num_blocks, block_length)
    return teacher_pass + refit_flops(teacher, student_sizes, num_blocks, block_length)


def teacher_pass_flops(teacher: Architecture, num_blocks: int, block_length: int) -> int:
    """Of a pass of a teacher's layers through calibration text, and of products of the output
    matrix's columns where it is the embedding too."""
    flops = int(layers_flops_per_token(teacher.layouts, teacher.sizes, block_length))
    covariance = 2 * teacher.sizes["vocab"] * teacher.sizes["embed"] ** 2
    is_tied = teacher.config.tie_word_embeddings
    return flops * num_blocks * block_length + (covariance if is_tied else 0)


def refit_flops(
    teacher: Architecture, student_sizes: Mapping[str, Any], num_blocks: int, block_length: int
) -> int:
    """Of `propagated` beside a teacher that was computed before, for a student that has less than
    its teacher in every layer.

    The student's layers are computed up to each group of linear layers that read the same, and what
    a refitted one writes is computed again.

    Args:
        teacher: what the student is cut out of.
        student_sizes: a tuple gives a size for each layer.
        num_blocks: of calibration text.
        block_length: tokens in a block.
    """
    layouts, num_tokens = teacher.layouts, num_blocks * block_length
    passes: Any = 0
    refits = 0
    if can_propagate(teacher):
        has_narrow_heads = student_sizes["head_dim"] != teacher.sizes["head_dim"]
        refitted = groups_of(teacher, has_narrow_heads)
        for layer in range(student_sizes["layers"]):
            sizes, before = sizes_in_layer(student_sizes, layer), 0
            for group in groups_of(teacher, has_narrow_heads=False):
                heads = "kv_groups" in dimensions_of(layouts[group[0]])[1]
                before += _attention_flops(sizes, block_length) if heads else 0
                linear = [2 * math.prod(shape_of(layouts[pattern], sizes)) for pattern in group]
                if group in refitted:
                    writes = not reads_stream(group[0], teacher)
                    passes += before + (sum(linear) if writes else 0)
                    for pattern in group:
                        refits += _linear_refit_flops(pattern, teacher, sizes)
                    refits += _moments_flops(group[0], teacher, sizes, num_tokens)
                before += sum(linear)
    else:
        passes += layers_flops_per_token(layouts, student_sizes, block_length)
    return (
        int(passes) * num_tokens + refits + _output_refit_flops(teacher, student_sizes, num_tokens)
    )


def _moments_flops(pattern: str, teacher: Architecture, sizes: Sizes, num_tokens: int) -> int:
    """Of the products of a group's inputs with themselves and with their targets."""
    bias = has_bias(pattern, teacher)
    inputs = shape_of(teacher.layouts[pattern], sizes)[1] + bias
    reads = reads_stream(pattern, teacher)
    targets = teacher.sizes["embed"] + bias if reads else sizes["embed"]
    return int(2 * num_tokens * inputs * (inputs + targets))


def _linear_refit_flops(pattern: str, teacher: Architecture, sizes: Sizes) -> int:
    """Of re-solving one linear layer from its moments."""
    bias = has_bias(pattern, teacher)
    rows, inputs = shape_of(teacher.layouts[pattern], sizes)
    inputs += bias
    targets = teacher.sizes["embed"] + bias if reads_stream(pattern, teacher) else 0
    return _solve_flops(inputs, rows) + 2 * rows * inputs * (inputs + targets)


def _output_refit_flops(teacher: Architecture, sizes: Sizes, num_tokens: int) -> int:
    """Of re-solving the output matrix, or the gains before it where it is the embedding too."""
    embed, targets, vocab = sizes["embed"], teacher.sizes["embed"], sizes["vocab"]
    moments = 2 * num_tokens * embed * (embed + targets)
    if teacher.config.tie_word_embeddings:
        return int(moments + _solve_flops(embed, 1))
    products = 2 * vocab * embed * (embed + targets)
    return int(moments + products + _solve_flops(embed, vocab))


def _solve_flops(unknowns: int, solutions: int) -> int:
    return unknowns**3 // 3 + 2 * unknowns**2 * solutions


def _attention_flops(sizes: Sizes, context_length: int) -> int:
    heads = attention_width(sizes)
    return int(4 * heads * context_length)


def refit_bytes(teacher: Architecture, student: Architecture, tokens: int, measures: bool) -> int:
    """What refitting a student holds at most on its device, an estimate.

    Both models in bfloat16; every layer's inputs and targets of all tokens; in float64 the products
    of the widest layer's inputs, with their factor and what is solved for.

    Args:
        teacher: that it is cut out of.
        student: that is refitted.
        tokens: of calibration.
        measures: whether the teacher's own moments are measured before, all of a layer at once.
    """

    layouts, sources = teacher.layouts, sources_of(teacher)
    widest_sizes = {axis: _largest(size) for axis, size in student.sizes.items()}
    embed = teacher.sizes["embed"]
    widest = max(shape_of(layouts[pattern], widest_sizes)[1] for pattern in sources)
    weights = 2 * (teacher.count(1).parameters + student.count(1).parameters)
    groups = len(groups_of(teacher, has_narrow_heads=False))
    of_token = 2 * (student.sizes["embed"] + (1 + groups) * embed + widest)
    solving = 8 * widest * (4 * widest + embed)
    measuring = 0
    if measures:
        read = set(sources.values()) | stream_norms(teacher)
        in_layer = [pattern for pattern in read if "{i}" in pattern]
        inputs = [shape_of(layouts[pattern], teacher.sizes)[-1] for pattern in in_layer]
        measuring = 8 * sum(number**2 for number in inputs)
    return int(weights + tokens * of_token + max(solving, measuring))


def _largest(size: Any) -> Any:
    return max(size) if isinstance(size, tuple) else size
