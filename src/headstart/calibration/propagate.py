"""Least squares layer by layer: each layer is re-solved on what those before it really compute.

`least_squares` imitates a linear layer of the teacher on the teacher's own activations. A student's
layers see other ones, since all layers before them are cut as well, and their errors add up. Here
both models go through the same text side by side, and in the order in which the student computes,
with x the student's inputs and z the teacher's, each linear layer becomes the one that is closest

- to the teacher's output W z, where it reads the stream,
- to the teacher's output and what the student's stream lacks by then, where it writes to it,

drawn towards what it was. The last layer before removed ones also makes up for those. Where the
output matrix is the input embedding too and has to stay, the last norm's gains are what is fitted.

Source: targets of the whole model on the small one's inputs as in GPTAQ (arXiv 2504.02692), which
quantises; here the stream's error is added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headstart.calibration.activations import (
    TeacherPass,
    TeacherSource,
    can_propagate,
    groups_of,
    reads_stream,
)
from headstart.calibration.layer_by_layer import (
    TOKENS_PER_BATCH,
    LayerwiseForward,
    batches_of,
    linear_of,
)
from headstart.calibration.moments import ROWS_AT_ONCE, has_bias, products, rows_of, widest
from headstart.calibration.share import ALONE, Share
from headstart.model.axes import kept_indices
from headstart.model.checkpoint import Checkpoint
from headstart.model.cut import assemble_student, embedding_scale, slice_tensors
from headstart.model.spec import SubnetSpec
from headstart.system.device import default_device, load_frozen, release_memory
from headstart.system.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRIOR_TOKENS = 1024
"""Tokens of uncorrelated inputs, as large as the calibration text's in the mean, that speak for a
layer as it was. What a stream lacks is noisy, and with little text there is nothing else to hold on
to. Of 256, 1,024 and 4,096 it did best on the demo's student, with 2,048 tokens of text as with
8,192; with 32,768 it is as good as 256."""


def refit_on_itself(
    teacher: Checkpoint,
    sliced: Iterable[tuple[str, Tensor]],
    spec: SubnetSpec,
    blocks: Int[Tensor, "blocks tokens"],
    together: bool = False,
) -> dict[str, Tensor]:
    """A student's tensors by their names in files, after what `propagated` makes of them.

    Args:
        teacher: the checkpoint that it was cut out of.
        sliced: (name, tensor) pairs of it by their names in files, on the CPU.
        spec: what it has kept.
        blocks: calibration token ids.
        together: all processes call it at once and share the work; each returns all tensors.
    """
    share = Share.of_this_process(len(blocks), together)
    mine = share.blocks(blocks)
    aliases = teacher.architecture.family.aliases
    # Copies, since these are views of files.
    in_files = {name: part.clone(memory_format=torch.contiguous_format) for name, part in sliced}
    tensors = {aliases.get(name, name): tensor for name, tensor in in_files.items()}
    release_memory()
    model = load_frozen(teacher.folder, default_device())
    copies = ((name, tensor.to(model.device, model.dtype)) for name, tensor in tensors.items())
    student = assemble_student(copies, teacher.architecture, spec)
    with progress("refit", mine.numel() * len(spec.layers), "tokens in layers") as advance:
        source = TeacherPass(model, batches_of(mine))
        for _ in propagated(source, student, tensors, spec, advance, share=share):
            pass
    return in_files


def refitted_student(
    teacher: TeacherSource, state: Iterable[tuple[str, Tensor]], spec: SubnetSpec
) -> PreTrainedModel:
    """A plain slice of a teacher in memory, after what `propagated` makes of it.

    Args:
        teacher: what it is refitted beside; remembered, it serves any number of students.
        state: the teacher's (name, tensor) pairs, without an output matrix that is the embedding.
        spec: what to keep.

    Returns:
        A model in eval mode with weights of its own, on the device and in the precision of `state`.
    """
    architecture, aliases = teacher.architecture, teacher.architecture.family.aliases
    tensors = {
        aliases.get(name, name): part.clone(memory_format=torch.contiguous_format)
        for name, part in slice_tensors(state, architecture, spec)
    }
    student = assemble_student(tensors.items(), architecture, spec)
    for _ in propagated(teacher, student, tensors, spec):
        pass
    return student


@torch.no_grad()
def propagated(
    teacher: TeacherSource,
    student: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    spec: SubnetSpec,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
    prior_tokens: int = PRIOR_TOKENS,
    share: Share = ALONE,
) -> Iterator[tuple[str, Tensor]]:
    """Refit a student on what it computes itself.

    Args:
        teacher: the whole teacher, computing calibration text or remembering it; its model is left
            as it was.
        student: cut out of it, on the same device, with weights of its own or those of `tensors`;
            its linear layers are changed one by one.
        tensors: the student's, by their names in the model, as precise as they shall be; they are
            changed in place.
        spec: what the student has kept.
        on_batch: called for each of the student's layers with the tokens of each batch done, for
            progress.
        prior_tokens: that speak for a layer as it was, see `PRIOR_TOKENS`.
        share: this process' part, where several refit the same student; the teacher's text is that
            part of the text.

    Yields:
        (name, tensor) pairs of linear layers, in the order of computation: of all that come after
        something was removed; last of the output matrix, or of the norm before it, which for a
        family that cannot is the only one.
    """
    architecture, batches = teacher.architecture, teacher.batches
    sizes = architecture.sizes
    if spec.sizes(sizes) == sizes:
        return
    cut = LayerwiseForward(student, batches)
    embed = torch.tensor(spec.embed, device=teacher.model.device)
    num_tokens = share.count(len(cut.hidden), embed.device)
    refit = _Refit(teacher, cut, tensors, embed, prior_tokens / num_tokens, num_tokens, share)
    if not can_propagate(architecture):
        for position in range(len(cut.layers)):
            cut.run(position, on_batch=on_batch)
        yield from refit.output()
        return
    groups = groups_of(architecture, spec.head_dim is not None)
    is_same = spec.layers[0] == 0
    followers = (*spec.layers[1:], sizes["layers"])
    for position, (layer, following) in enumerate(zip(spec.layers, followers, strict=True)):
        is_same = is_same and following == layer + 1 and _is_whole(spec, position, sizes)
        refitted = [] if is_same else groups
        before, values, after = teacher.layer(
            layer, following, [pattern for pattern, *_ in refitted], embed
        )
        lacking = rows_of(before).sub_(cut.hidden)
        for group in refitted:
            inputs, is_biased = cut.inputs(group[0], position), has_bias(group[0], architecture)
            if reads_stream(group[0], architecture):
                pieces = _pieces(inputs, values.pop(group[0]))
                moments = refit.moments(pieces, is_biased, biases_targets=True)
                for pattern in group:
                    layout, kept = architecture.layouts[pattern], spec.kept_in_layer(position)
                    rows = kept_indices(layout, sizes, kept)[0]
                    taught_by = _Rows(linear_of(teacher.model, pattern, layer), rows)
                    yield from refit.linear(pattern, position, moments, taught_by)
            else:
                (pattern,) = group
                lacking += values.pop(pattern)
                moments = refit.moments(_pieces(inputs, lacking), is_biased)
                yield from refit.linear(pattern, position, moments)
                for x, y in _pieces(inputs, lacking):
                    y.sub_(cut.linear(pattern, position)(x))  # what is lacking now
            del inputs
        cut.hidden.copy_(after - lacking)
        for batch in batches:
            on_batch(batch.numel())
    yield from refit.output()


class _Moments(NamedTuple):
    """Means over tokens of x x^T and y x^T, with x a layer's inputs and y its targets.

    With a bias, x has a last number that is one.
    """

    gram: Float[Tensor, "inputs inputs"]
    cross: Float[Tensor, "targets inputs"]


class _Rows(NamedTuple):
    """Some of a linear layer's outputs."""

    linear: nn.Linear
    rows: Int[Tensor, " outputs"]


@dataclass(frozen=True)
class _Refit:
    """Changes a student's linear layers one by one.

    Attributes:
        teacher: on its way through the text.
        student: beside it.
        tensors: the student's by their names in the model; they are changed in place.
        channels: of the teacher's stream that the student has kept.
        prior: weight of a layer as it was, against the mean over tokens.
        num_tokens: of the whole text.
        share: this process' part.
    """

    teacher: TeacherSource
    student: LayerwiseForward
    tensors: Mapping[str, Tensor]
    channels: Int[Tensor, " kept"]
    prior: float
    num_tokens: int
    share: Share

    def moments(
        self,
        pieces: Iterable[tuple[Float[Tensor, "*batch inputs"], Float[Tensor, "*batch targets"]]],
        is_biased: bool = False,
        biases_targets: bool = False,
    ) -> _Moments:
        """The moments of inputs and targets over the whole text, from pairs of this process' part.

        A bias gives them a last number that is one.
        """
        gram = cross = torch.zeros(())
        for place, (x, y) in enumerate(pieces):
            if is_biased:
                ones = x.new_ones(*x.shape[:-1], 1)
                x, y = torch.cat([x, ones], -1), torch.cat([y, ones], -1) if biases_targets else y
            if place == 0:
                gram, cross = (
                    torch.zeros(
                        side.shape[-1], x.shape[-1], dtype=widest(x.device), device=x.device
                    )
                    for side in (x, y)
                )
            gram += products(x, x)
            cross += products(y, x)
        return _Moments(*(self.share.total(sums).div_(self.num_tokens) for sums in (gram, cross)))

    def linear(
        self, pattern: str, layer: int | None, moments: _Moments, taught_by: _Rows | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Change a linear layer for the moments of its inputs and targets.

        Targets are the outputs that are wanted, or else what `taught_by` turns into these.
        """
        linear, gram = self.student.linear(pattern, layer), moments.gram
        stem = pattern.format(i=layer).removesuffix("weight")
        names = [f"{stem}{kind}" for kind, _ in linear.named_parameters()]
        ridge = torch.zeros_like(gram.diagonal())  # a bias needs none
        ridge[: linear.in_features] = self.prior * gram.diagonal()[: linear.in_features].mean()
        factor = torch.linalg.cholesky(gram + (ridge + torch.finfo(gram.dtype).tiny).diag())
        for rows in self.share.rows(linear.out_features).split(ROWS_AT_ONCE):  # type: ignore[no-untyped-call]
            before = _columns([self.tensors[name] for name in names], rows, gram)
            if taught_by is None:
                wanted = moments.cross[rows.to(gram.device)]
            else:
                parameters = list(taught_by.linear.parameters())
                wanted = _columns(parameters, taught_by.rows[rows], gram) @ moments.cross
            after = before + torch.cholesky_solve((wanted - before @ gram).T, factor).T
            parts = after.tensor_split([linear.in_features], dim=1)
            for name, part in zip(names, parts, strict=False):
                tensor = self.tensors[name]
                tensor[rows] = part.reshape(tensor[rows].shape).to(tensor)
        for name in names:
            self.share.join(self.tensors[name], gram.device)
            self.student.model.get_parameter(name).copy_(self.tensors[name])
            yield name, self.tensors[name]

    def output(self) -> Iterator[tuple[str, Tensor]]:
        """Change the output matrix, or the gains before it, after both models' last layers."""
        architecture = self.teacher.architecture
        for norm, readers in architecture.family.readers.items():
            for pattern in (pattern for pattern in readers if "{i}" not in pattern):
                if pattern not in architecture.layouts:
                    yield from self.gains(norm)
                    continue
                pieces = zip(self.student.normed(norm), self._wanted(norm), strict=True)
                outputs = linear_of(self.teacher.model, pattern, None)
                taught_by = _Rows(outputs, torch.arange(outputs.out_features))
                yield from self.linear(pattern, None, self.moments(pieces), taught_by)

    def gains(self, norm: str) -> Iterator[tuple[str, Tensor]]:
        """Change the gains of the last norm for an output matrix that is the input embedding too.

        The student's logits are to come closest to the teacher's, both less their mean over the
        vocabulary, which a softmax does not see. With E the student's output matrix and F the
        teacher's, both less the mean of their rows, x the student's normalised stream, b its norm's
        bias, and z what the teacher's norm makes, the gains g minimise the mean of
        |E (g x + b) - F z|^2, drawn towards what they were.
        """
        student, teacher = self.student, self.teacher
        offset, gains = student.architecture.family.norm_offset, self.tensors[norm]
        stem, parameter = norm.removesuffix("weight"), student.model.get_parameter(norm)
        scale = embedding_scale(teacher.architecture, len(self.channels))
        with_theirs = scale * teacher.output_covariance[self.channels]
        of_ours = scale * with_theirs[:, self.channels]
        bias = self.tensors.get(f"{stem}bias", torch.zeros(1)).to(of_ours)
        before = gains.to(of_ours) + offset
        parameter.fill_(1 - offset)  # not before, since the two may share memory
        gram: Any = 0
        cross: Any = 0
        for stream, wanted in zip(student.normed(norm), self._wanted(norm), strict=True):
            x = rows_of(stream).to(of_ours) - bias
            y = rows_of(wanted).to(of_ours) @ with_theirs.T - of_ours @ bias.expand(x.shape[1])
            gram = gram + of_ours * (x.T @ x)
            cross = cross + (x * y).sum(dim=0)
        num_tokens = self.num_tokens
        gram, cross = self.share.total(gram), self.share.total(cross)
        ridge = self.prior * gram.diagonal().mean() / num_tokens
        factor = torch.linalg.cholesky(gram / num_tokens + ridge * torch.eye(len(gram)).to(gram))
        after = torch.cholesky_solve((cross / num_tokens + ridge * before)[:, None], factor)[:, 0]
        gains.copy_(after - offset)
        parameter.copy_(gains)
        yield norm, gains

    def _wanted(self, norm: str) -> Iterator[Float[Tensor, "batch tokens embed"]]:
        """What the teacher's last norm makes of its last hidden states, batch by batch."""
        module = self.teacher.model.get_submodule(norm.removesuffix(".weight"))
        last = self.teacher.stream(self.teacher.architecture.sizes["layers"])
        return map(module, self.student.batches(last))


def _columns(
    parts: Sequence[Tensor], rows: Int[Tensor, " rows"], like: Tensor
) -> Float[Tensor, "rows inputs"]:
    """Some rows of a weight, with its bias as the last column if there is one."""
    return torch.column_stack([part[rows.to(part.device)] for part in parts]).to(like)


def _pieces(
    inputs: Float[Tensor, "tokens inputs"], targets: Float[Tensor, "tokens targets"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both, of some tokens at a time."""
    pieces = (all.split(TOKENS_PER_BATCH) for all in (inputs, targets))  # type: ignore[no-untyped-call]
    return zip(*pieces, strict=True)


def _is_whole(spec: SubnetSpec, position: int, sizes: Mapping[str, Any]) -> bool:
    """Whether a layer has kept all that its teacher's layer has."""
    kept = spec.kept_in_layer(position)
    return all(len(units) == sizes[axis] for axis, units in kept.items())
