"""What may be done ahead of a run, elsewhere and without its folder; a run then finds it."""

from __future__ import annotations

from typing import Any

from headstart.model.checkpoint import Checkpoint
from headstart.recipe import Recipe
from headstart.runs.caches import Teachers, cached_distillation, check_caches, write_caches
from headstart.runs.correction import check_correction, corrected_teacher
from headstart.runs.revisions import at_commits, find_revisions
from headstart.runs.run import in_tokens, needed_text
from headstart.runs.teachers import checked_teachers, trimmed_alike
from headstart.runs.vocabulary import check_trims, trimmed_teacher
from headstart.system.distributed import from_main, process_group
from headstart.system.errors import UserError
from headstart.text.blocks import TokenBlocks
from headstart.text.prepare import check_source, check_vocabulary, prepare
from headstart.text.settings import DataSettings
from headstart.training.teacher import DistillationTeacher


def run_prepare(recipe: Recipe) -> TokenBlocks:
    """Read and tokenise the text of a run, as all of its stages find it then.

    Of the teacher nothing is read but its config and tokenizer, unless its vocabulary is trimmed.
    Baselines with another tokenizer have text of their own, which is not prepared here.

    Raises:
        UserError: as `prepare`; or the vocabulary cannot be trimmed so.
    """
    return _teachers_and_text(recipe, reads_weights=False)[1]


def run_correct(recipe: Recipe) -> Checkpoint:
    """Tune the teacher of a recipe on its text, without a run folder.

    Raises:
        UserError: as `check_correction` and `corrected_teacher`, or teacher or text do not read.
    """
    with process_group():
        check_correction(recipe)
        teachers, text = _teachers_and_text(recipe, reads_weights=True)
        return corrected_teacher(recipe, teachers[""].checkpoint, text)


def run_cache_teacher(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Write the teacher cache of every arm that distils from one, ahead of the run.

    Returns:
        The manifest of each cache, by its path.

    Raises:
        UserError: no arm has a cache, or a folder holds another one.
    """
    arms = recipe.pretrain.arms
    if not cached_distillation(arms):
        raise UserError(
            "no arm of the recipe distils from a cache; set kd.cache, and kd.top_k or kd.samples, "
            "in pretrain.arms"
        )
    with process_group():
        check_correction(recipe)
        teachers, text = _teachers_and_text(recipe, reads_weights=True)
        if not all(kd.teacher for kd in cached_distillation(arms)):
            corrected = corrected_teacher(recipe, teachers[""].checkpoint, text)
            teachers = {**teachers, "": DistillationTeacher(corrected)}
        from_main(lambda: check_caches(teachers, text, arms))
        pretrain = in_tokens(recipe.pretrain, text.bytes_per_token("validation"))
        return write_caches(teachers, text, pretrain, recipe.train, arms)


def _teachers_and_text(recipe: Recipe, reads_weights: bool) -> tuple[Teachers, TokenBlocks]:
    """The teachers of a recipe, of which only one is read for the text alone, and the text in
    tokens, without a run folder."""

    def found() -> tuple[dict[str, DistillationTeacher], DataSettings]:
        pinned = at_commits(recipe, find_revisions(recipe))
        check_source(pinned.data)
        opened = Checkpoint.open_whole if reads_weights else Checkpoint.open
        whole = opened(pinned.teacher)
        whole.architecture.check_context(pinned.data.block_length)
        check_trims(whole, pinned.vocabulary)
        others = checked_teachers(recipe, pinned, whole) if reads_weights else {}
        teacher = trimmed_teacher(whole, pinned.vocabulary, pinned.data)
        teachers = {"": DistillationTeacher(teacher), **trimmed_alike(others, whole, teacher)}
        for of_arms in teachers.values() if reads_weights else ():
            assert of_arms.checkpoint.hash  # which travels to the other processes
        return teachers, pinned.data

    with process_group():
        teachers, data = from_main(found)
        teacher = teachers[""].checkpoint
        needed = needed_text(recipe, teacher.architecture)
        text = prepare(data, teacher.folder, needed=needed)
        from_main(lambda: check_vocabulary(text, teacher.architecture.config.vocab_size))
        return teachers, text
