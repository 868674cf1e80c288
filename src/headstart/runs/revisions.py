"""Which commits a run reads of what its recipe names on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from headstart.demo import DEMO
from headstart.model.checkpoint import model_commit
from headstart.recipe import Recipe
from headstart.runs.folder import kept_revisions
from headstart.searching.bins import BinSettings
from headstart.system.errors import UserError
from headstart.system.formats import COUNT_PATTERN
from headstart.system.hub import HubName
from headstart.text.corpus import dataset_commit
from headstart.text.prepare import check_source


def find_revisions(recipe: Recipe) -> dict[str, str]:
    """The commit of everything on the hub, by its name in the recipe.

    A run that was begun keeps its commits, and the hub is not asked what a branch is now.

    Raises:
        UserError: the text does not read, see `check_source`; a name or revision does not exist; or
            a model and a dataset have one name.
    """
    kept = kept_revisions(Path(recipe.output))
    # Text that was just looked up is read here, before models are fetched; text at a kept commit
    # may be prepared already, and then nothing is read.
    check_source(at_commits(recipe, kept).data)
    datasets, models, counted = (set(of(recipe)) for of in (_datasets, _models, _counted))
    for text in sorted(datasets & (models | counted)):
        raise UserError(
            f"{text} names a model and a dataset in the recipe: write one of them as {text}@main"
        )
    revisions = {}
    for text in sorted(datasets | models):
        if name := HubName.parse(text):
            look_up = dataset_commit if text in datasets else model_commit
            revisions[text] = kept.get(text) or look_up(name)
    for text in sorted(counted - models):
        if name := HubName.parse(text):
            with suppress(UserError):  # told where the bin is needed, in the words of its key
                revisions[text] = kept.get(text) or model_commit(name)
    return revisions


def at_commits(recipe: Recipe, revisions: Mapping[str, str]) -> Recipe:
    """The recipe with commits in its names on the hub, where `revisions` has these."""

    def at(text: str) -> str:
        name = HubName.parse(text) if text in revisions else None
        return str(name.at(revisions[text])) if name else text

    def bin_at(bin: BinSettings) -> BinSettings:
        return replace(bin, around=at(bin.around)) if isinstance(bin.around, str) else bin

    data, search, pretrain = recipe.data, recipe.search, recipe.pretrain
    mixture = tuple(replace(part, source=at(part.source)) for part in data.mixture)
    arms = tuple(
        replace(arm, kd=replace(arm.kd, teacher=at(arm.kd.teacher))) if arm.kd else arm
        for arm in pretrain.arms
    )
    return replace(
        recipe,
        teacher=at(recipe.teacher),
        data=replace(data, source=at(data.source), mixture=mixture),
        search=replace(search, bin=bin_at(search.bin), bins=tuple(map(bin_at, search.bins))),
        pretrain=replace(pretrain, baselines=tuple(map(at, pretrain.baselines)), arms=arms),
    )


def _datasets(recipe: Recipe) -> Iterator[str]:
    """What the recipe reads text from that is not on this machine."""
    for source in (recipe.data.source, *(part.source for part in recipe.data.mixture)):
        if source != DEMO and not Path(source).expanduser().exists():
            yield source


def _models(recipe: Recipe) -> Iterator[str]:
    """Teachers and baselines that are not on this machine."""
    pretrain = recipe.pretrain
    for model in (recipe.teacher, *pretrain.teachers, *pretrain.baselines):
        if model != DEMO and not Path(model).is_dir():
            yield model


def _counted(recipe: Recipe) -> Iterator[str]:
    """The models that only stand for the size of a bin, and that are not on this machine."""
    for bin in (recipe.search.bin, *recipe.search.bins):
        text = str(bin.around or "")
        if text and not COUNT_PATTERN.fullmatch(text) and text != DEMO and not Path(text).is_dir():
            yield text
