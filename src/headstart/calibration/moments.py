"""What a teacher's activations look like: the moments that least squares and rotation need.

One pass over calibration text, layer by layer: the hidden states of all tokens are in memory, and
one layer's sums at a time. What is learned lies on disk, in one file for each layer, and is read
tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headstart.calibration.layer_by_layer import LayerwiseForward
from headstart.calibration.share import ALONE, Share
from headstart.model.architecture import Architecture
from headstart.model.axes import axes_of, dimensions_of
from headstart.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 8192
"""Of a matrix in float64, which an embedding or an output matrix would otherwise be as a whole."""


@dataclass(frozen=True)
class Statistics:
    """The moments of a teacher's activations over calibration tokens.

    Of an RMSNorm that layers read, what is kept are moments of the normalised stream z, before its
    gains; they turn with the stream, so those of a rotated teacher need no pass of their own.

    Attributes:
        folder: holds the files that `collect_statistics` wrote.
        basis: of the residual stream, where the teacher is a rotated one, whose gains are ones;
            None for the teacher that was measured.
    """

    folder: Path
    basis: Float[Tensor, "embed components"] | None = field(default=None, compare=False)

    def gram(self, source: str) -> Float[Tensor, "units units"]:
        """Mean over tokens of x x^T, where x is what linear layers read; see `sources_of`."""
        gram, gains = self._read(f"{source}.gram"), self._find(f"{source}.gains")
        if gains is None:
            return gram
        return self._turned(gram) if self.basis is not None else gains[:, None] * gram * gains

    def mean(self, source: str) -> Float[Tensor, " units"]:
        """Mean over tokens of what linear layers read."""
        mean, gains = self._read(f"{source}.mean"), self._find(f"{source}.gains")
        if gains is None:
            return mean
        return self.basis.T @ mean if self.basis is not None else gains * mean

    def share(self, norm: str) -> Float[Tensor, " units"]:
        """Mean over tokens of x_c^2 / mean(x^2) for each channel of an RMSNorm's input."""
        share = self._find(f"{norm}.share")
        if share is None:
            gram = self._read(f"{norm}.gram")
            share = (gram if self.basis is None else self._turned(gram)).diagonal()
        return share / share.mean()

    def residual(self) -> Float[Tensor, "embed embed"]:
        """Mean over tokens of z z^T, summed over all norms that layers read."""
        grams = []
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                norms = [name.removesuffix(".gains") for name in file.keys() if ".gains" in name]  # noqa: SIM118
                grams += [file.get_tensor(f"{norm}.gram") for norm in norms]
        assert grams and self.basis is None
        return torch.stack(grams).sum(dim=0)

    def _turned(self, gram: Float[Tensor, "embed embed"]) -> Float[Tensor, "components components"]:
        assert self.basis is not None
        return self.basis.T @ gram @ self.basis

    def _read(self, name: str) -> Tensor:
        found = self._find(name)
        assert found is not None, name
        return found

    def _find(self, name: str) -> Tensor | None:
        layer = re.search(r"\.(\d+)\.", name)
        with safe_open(_file(self.folder, layer and int(layer[1])), framework="pt") as file:
            found: Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        return found


def sources_of(architecture: Architecture) -> dict[str, str]:
    """Where each linear layer's input comes from: patterns of weight -> source.

    The source is the norm that writes it, by its weight, if that is all that the norm does; layers
    that read the same norm then share its moments. Else it is the layer itself.

    >>> from transformers import LlamaConfig
    >>> sources = sources_of(Architecture.of(LlamaConfig()))
    >>> sources["model.layers.{i}.self_attn.v_proj.weight"]
    'model.layers.{i}.input_layernorm.weight'
    >>> sources["model.layers.{i}.mlp.down_proj.weight"]
    'model.layers.{i}.mlp.down_proj.weight'
    """
    norms = norm_before(architecture)
    return {
        pattern: norms.get(pattern, pattern)
        for pattern, layout in architecture.layouts.items()
        if len(dimensions_of(layout)) == 2 and (pattern in norms or "vocab" not in axes_of(layout))
    }


def norm_before(architecture: Architecture) -> dict[str, str]:
    """The norm that each linear layer reads, for those that read one: patterns of weights."""
    readers = architecture.family.readers
    return {reader: norm for norm, of_norm in readers.items() for reader in of_norm}


def rms_norms_of(architecture: Architecture) -> tuple[str, ...]:
    """The weights of a model's RMSNorms, as patterns; a norm with a bias is a LayerNorm."""
    return tuple(
        pattern
        for pattern, layout in architecture.layouts.items()
        if pattern.endswith(".weight")
        and len(dimensions_of(layout)) == 1
        and not has_bias(pattern, architecture)
    )


def has_bias(pattern: str, architecture: Architecture) -> bool:
    """Whether the module of a weight has a bias, too."""
    return f"{pattern.removesuffix('.weight')}.bias" in architecture.layouts


def writing_norms(architecture: Architecture) -> list[str]:
    """The RMSNorms that scale channels on their way into the residual stream."""
    readers, layouts = architecture.family.readers, architecture.layouts
    return [
        pattern
        for pattern in rms_norms_of(architecture)
        if layouts[pattern] == "embed" and pattern not in readers
    ]


def stream_norms(architecture: Architecture) -> set[str]:
    """The RMSNorms that layers read."""
    return set(architecture.family.readers) & set(rms_norms_of(architecture))


@torch.no_grad()
def collect_statistics(
    teacher: PreTrainedModel,
    batches: Sequence[Int[Tensor, "batch tokens"]],
    folder: Path,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
    share: Share = ALONE,
) -> None:
    """Measure a teacher's activations and write their moments.

    Products of a batch are taken in the model's precision, float32 at least, and added up in
    float64.

    Args:
        teacher: the whole teacher, in eval mode; it is left as it was.
        batches: calibration token ids.
        folder: exists, and receives one file for each layer and one for the rest.
        on_batch: called for each layer with the tokens of each batch done, for progress.
        share: this process' part, where several measure one teacher; the batches are of that part
            of the text, and the first process writes.

    Raises:
        UserError: there is no batch.
    """
    if not batches:
        raise UserError("calibration needs at least one block; add text to the data")
    states = LayerwiseForward(teacher, batches)
    for number in range(len(states.layers)):
        with _summing(states, number) as sums:
            states.run(number, on_batch=on_batch)
        _write(folder, states, number, sums, share)
    with _summing(states, None) as sums:
        for norm in _norms(states, None):
            for _ in states.normed(norm):
                pass
    _write(folder, states, None, sums, share)


@contextmanager
def _summing(states: LayerwiseForward, layer: int | None) -> Iterator[dict[str, Tensor]]:
    """Sums over all tokens that go through one layer, or through what is outside the layers."""
    architecture, sums = states.architecture, dict[str, Tensor]()
    sources, rms_norms = set(sources_of(architecture).values()), rms_norms_of(architecture)

    def add(pattern: str, kind: str, value: Tensor) -> None:
        name = f"{pattern.format(i=layer)}.{kind}"
        if name not in sums:
            sums[name] = torch.zeros_like(value, dtype=widest(value.device))
        sums[name] += value

    def add_moments(pattern: str, values: Tensor) -> None:
        add(pattern, "gram", products(values, values))
        add(pattern, "mean", rows_of(values).sum(dim=0))

    def see_norm(pattern: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if pattern in rms_norms:
            tokens = rows_of(inputs[0])
            mean_square = tokens.square().mean(dim=-1, keepdim=True)
            tokens = tokens * (mean_square + architecture.config.rms_norm_eps).rsqrt()
            if pattern in stream_norms(architecture):
                add_moments(pattern, tokens)
            else:
                add(pattern, "share", tokens.square().sum(dim=0))
        elif pattern in sources:
            add_moments(pattern, output)

    def see_linear(pattern: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add_moments(pattern, inputs[0])

    norms = _norms(states, layer)
    with ExitStack() as undo:
        for pattern, norm in norms.items():
            undo.callback(norm.register_forward_hook(partial(see_norm, pattern)).remove)
        for pattern in sources - set(norms):
            if ("{i}" in pattern) == (layer is not None):
                hook = partial(see_linear, pattern)
                undo.callback(states.linear(pattern, layer).register_forward_pre_hook(hook).remove)
        yield sums


def _norms(states: LayerwiseForward, layer: int | None) -> dict[str, nn.Module]:
    """The norms of one layer, or those outside the layers, by the patterns of their weights."""
    architecture = states.architecture
    patterns = (*rms_norms_of(architecture), *architecture.family.readers)
    return {
        pattern: states.model.get_submodule(pattern.format(i=layer).removesuffix(".weight"))
        for pattern in dict.fromkeys(patterns)
        if ("{i}" in pattern) == (layer is not None)
    }


def rows_of(values: Float[Tensor, "*batch units"]) -> Float[Tensor, "tokens units"]:
    """Activations as rows, half precisions as float32."""
    return values.flatten(0, -2).to(torch.promote_types(values.dtype, torch.float32))


def products(
    some: Float[Tensor, "*batch units"], others: Float[Tensor, "*batch channels"]
) -> Float[Tensor, "units channels"]:
    """Sums over tokens of a b^T, in float32 at least."""
    with _matrix_instructions(some.dtype == others.dtype == torch.bfloat16):
        return rows_of(some).T @ rows_of(others)


@contextmanager
def _matrix_instructions(are_short: bool) -> Iterator[None]:
    """Let CPUs that can multiply float32 as bfloat16, adding up in float32.

    Of numbers that were bfloat16 before they were float32 this loses nothing, in a third of the
    time. Before torch 2.9 there is no such switch.
    """
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not are_short or matmul is None:
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _file(folder: Path, layer: int | None) -> Path:
    """Where the moments of a layer are, or those of what is outside the layers."""
    return folder / ("rest.safetensors" if layer is None else f"layer-{layer:04}.safetensors")


def _write(
    folder: Path,
    states: LayerwiseForward,
    layer: int | None,
    sums: Mapping[str, Tensor],
    share: Share,
) -> None:
    """Write the means over all tokens, and the gains that are left out of them."""
    architecture = states.architecture
    num_tokens = share.count(len(states.hidden), states.hidden.device)
    tensors = {name: (share.total(sums[name]) / num_tokens).cpu() for name in sorted(sums)}
    if share.rank > 0:
        return
    for pattern in stream_norms(architecture) & set(_norms(states, layer)):
        name = pattern.format(i=layer)
        gains = states.model.get_parameter(name).detach().cpu().double()
        tensors[f"{name}.gains"] = gains + architecture.family.norm_offset
    save_file(tensors, _file(folder, layer))
