"""Shapes of arms that train from random weights and are not shaped like the student."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from headstart.model.architecture import Architecture
from headstart.model.checkpoint import read_architecture
from headstart.searching.candidate import Orders
from headstart.searching.run import space_of
from headstart.searching.settings import SearchSettings
from headstart.training.settings import PROPORTIONAL, STUDENT


def arm_shapes(
    names: Iterable[str], teacher: Architecture, search: SearchSettings, block_length: int
) -> dict[str, Architecture]:
    """The architectures that arms name as their shapes; the student's is not among them.

    Args:
        names: as in the recipe's arms.
        teacher: with the vocabulary that all share.
        search: whose bin the proportional shape lies in.
        block_length: tokens that attention spans, for bins in FLOPs.

    Raises:
        UserError: there is no such model, no table knows its family, or its context is too short.
    """
    shapes = {}
    for name in set(names) - {STUDENT}:
        if name == PROPORTIONAL:
            shapes[name] = proportional_shape(teacher, search, block_length)
        else:
            shapes[name] = _shape_of_model(name, teacher)
        shapes[name].check_context(block_length)
    return shapes


def proportional_shape(
    teacher: Architecture, search: SearchSettings, block_length: int
) -> Architecture:
    """The shape in a bin that is nearest to the teacher's proportions, with layers all alike."""
    settings = replace(search, init="slice", scored_as="slice", space="coarse-uniform")
    (candidate,) = space_of(teacher, settings, block_length).proportional(1)
    return teacher.student(candidate.spec(teacher, Orders.of_teacher(teacher.sizes)))


def _shape_of_model(name: str, teacher: Architecture) -> Architecture:
    """The architecture of a config file, a folder or a hub id, with the teacher's vocabulary."""
    path = Path(name)
    config = read_architecture(path.parent if path.name == "config.json" else name).config
    config.vocab_size = teacher.config.vocab_size
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(teacher.config, key, None))
    return Architecture.of(config)
