"""What a teacher's activations look like: the moments that least squares and rotation need.

One pass over calibration text, layer by layer: the hidden states of all tokens are in memory, and
one layer's sums at a time. What is learned lies on disk, in one file for each layer, and is read
tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headstart.assets import finished_folder
from headstart.subnet.axes import axes_of, dimensions_of, shape_of
from headstart.subnet.forward import LayerwiseForward
from headstart.subnet.rules import family_of, layouts_of, sizes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        files = sorted(self.folder.glob("*.safetensors"))
        norms = [
            name.removesuffix(".gains")
            for file in files
            for name in _names(file)
            if name.endswith(".gains")
        ]
        assert norms and self.basis is None
        return torch.stack([self._read(f"{norm}.gram") for norm in norms]).sum(dim=0)

    def _turned(self, gram: Float[Tensor, "embed embed"]) -> Float[Tensor, "components components"]:
        assert self.basis is not None
        return self.basis.T @ gram @ self.basis

    def _read(self, name: str) -> Tensor:
        found = self._find(name)
        assert found is not None, name
        return found

    def _find(self, name: str) -> Tensor | None:
        from safetensors import safe_open

        layer = re.search(r"\.(\d+)\.", name)
        with safe_open(_file(self.folder, layer and int(layer[1])), framework="pt") as file:
            found: Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        return found


def sources_of(config: PreTrainedConfig) -> dict[str, str]:
    """Where each linear layer's input comes from: patterns of weight -> source.

    The source is the norm that writes it, by its weight, if that is all that the norm does; layers
    that read the same norm then share its moments. Else it is the layer itself.

    >>> from transformers import LlamaConfig
    >>> sources = sources_of(LlamaConfig())
    >>> sources["model.layers.{i}.self_attn.v_proj.weight"]
    'model.layers.{i}.input_layernorm.weight'
    >>> sources["model.layers.{i}.mlp.down_proj.weight"]
    'model.layers.{i}.mlp.down_proj.weight'
    """
    norms = {reader: norm for norm, all in family_of(config).readers.items() for reader in all}
    return {
        pattern: norms.get(pattern, pattern)
        for pattern, layout in layouts_of(config).items()
        if len(dimensions_of(layout)) == 2 and (pattern in norms or "vocab" not in axes_of(layout))
    }


def rms_norms_of(config: PreTrainedConfig) -> tuple[str, ...]:
    """The weights of a model's RMSNorms, as patterns; a norm with a bias is a LayerNorm."""
    layouts = layouts_of(config)
    return tuple(
        pattern
        for pattern, layout in layouts.items()
        if pattern.endswith(".weight")
        and len(dimensions_of(layout)) == 1
        and f"{pattern.removesuffix('.weight')}.bias" not in layouts
    )


def writing_norms(config: PreTrainedConfig) -> list[str]:
    """The RMSNorms that scale channels on their way into the residual stream."""
    readers, layouts = family_of(config).readers, layouts_of(config)
    return [
        pattern
        for pattern in rms_norms_of(config)
        if layouts[pattern] == "embed" and pattern not in readers
    ]


def _stream_norms(config: PreTrainedConfig) -> set[str]:
    """The RMSNorms that layers read."""
    return set(family_of(config).readers) & set(rms_norms_of(config))


@torch.no_grad()
def collect_statistics(
    teacher: PreTrainedModel,
    batches: Sequence[Int[Tensor, "batch tokens"]],
    folder: Path,
    on_batch: Callable[[int], None] = lambda num_tokens: None,
) -> None:
    """Measure a teacher's activations and write their moments.

    Products of a batch are taken in the model's precision, float32 at least, and added up in
    float64.

    Args:
        teacher: the whole teacher, in eval mode; it is left as it was.
        batches: calibration token ids.
        folder: exists, and receives one file for each layer and one for the rest.
        on_batch: called for each layer with the tokens of each batch done, for progress.

    Raises:
        ValueError: there is no batch.
    """
    if not batches:
        raise ValueError("calibration needs at least one block; add text to the data")
    states = LayerwiseForward(teacher, batches)
    num_tokens = len(states.hidden)
    for number in range(len(states.layers)):
        with _summing(teacher, number) as sums:
            states.run(number, on_batch=on_batch)
        _write(folder, teacher, number, sums, num_tokens)
    with _summing(teacher, None) as sums:
        for norm in _norms(teacher, None):
            for _ in states.normed(norm):
                pass
    _write(folder, teacher, None, sums, num_tokens)


@contextmanager
def _summing(teacher: PreTrainedModel, layer: int | None) -> Iterator[dict[str, Tensor]]:
    """Sums over all tokens that go through one layer, or through what is outside the layers."""
    config, sums = teacher.config, dict[str, Tensor]()
    sources, rms_norms = set(sources_of(config).values()), rms_norms_of(config)

    def add(name: str, value: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros_like(value, dtype=widest(value.device))
        sums[name] += value

    def add_moments(name: str, values: Tensor) -> None:
        add(f"{name}.gram", products(values, values))
        add(f"{name}.mean", rows_of(values).sum(dim=0))

    def of_norm(name: str, pattern: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if pattern in rms_norms:
                tokens = rows_of(inputs[0])
                mean_square = tokens.square().mean(dim=-1, keepdim=True)
                tokens = tokens * (mean_square + config.rms_norm_eps).rsqrt()
                if pattern in _stream_norms(config):
                    add_moments(name, tokens)
                else:
                    add(f"{name}.share", tokens.square().sum(dim=0))
            elif pattern in sources:
                add_moments(name, output)

        return hook

    def of_linear(name: str) -> Callable[..., None]:
        return lambda module, inputs: add_moments(name, inputs[0])

    norms = _norms(teacher, layer)
    with ExitStack() as undo:
        for pattern, norm in norms.items():
            name = pattern.format(i=layer)
            undo.callback(norm.register_forward_hook(of_norm(name, pattern)).remove)
        for pattern in sources - set(norms):
            if ("{i}" in pattern) == (layer is not None):
                name = pattern.format(i=layer)
                linear = teacher.get_submodule(name.removesuffix(".weight"))
                undo.callback(linear.register_forward_pre_hook(of_linear(name)).remove)
        yield sums


def _norms(teacher: PreTrainedModel, layer: int | None) -> dict[str, nn.Module]:
    """The norms of one layer, or those outside the layers, by the patterns of their weights."""
    patterns = (*rms_norms_of(teacher.config), *family_of(teacher.config).readers)
    return {
        pattern: teacher.get_submodule(pattern.format(i=layer).removesuffix(".weight"))
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


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _write(
    folder: Path,
    teacher: PreTrainedModel,
    layer: int | None,
    sums: Mapping[str, Tensor],
    num_tokens: int,
) -> None:
    """Write the means over tokens, and the gains that are left out of them."""
    from safetensors.torch import save_file

    tensors = {name: (total / num_tokens).cpu() for name, total in sums.items()}
    for pattern in _stream_norms(teacher.config) & set(_norms(teacher, layer)):
        name = pattern.format(i=layer)
        gains = teacher.get_parameter(name).detach().cpu().double()
        tensors[f"{name}.gains"] = gains + family_of(teacher.config).norm_offset
    save_file(tensors, _file(folder, layer))


def cached_statistics(
    root: Path, key: Mapping[str, Any], collect: Callable[[Path], None]
) -> Statistics:
    """What `collect` writes into a folder, or wrote there before with an equal key.

    Args:
        root: where the folders are, one for each key, named by its hash; made if missing.
        key: all that the statistics depend on, as JSON: teacher, tokens, batches and precision.
        collect: called with an empty folder, which is kept if it ends without an error.
    """
    text = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    target = root / hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    if not target.is_dir():
        with finished_folder(target) as folder:
            collect(folder)
    return Statistics(target)


def statistics_flops(config: PreTrainedConfig, num_tokens: int) -> int:
    """FLOPs of the products that `collect_statistics` takes, besides the teacher's forward pass."""
    layouts, sizes = layouts_of(config), sizes_of(config)
    products = 0
    for pattern in set(sources_of(config).values()) | _stream_norms(config):
        repeats = sizes["layers"] if "{i}" in pattern else 1
        products += repeats * shape_of(layouts[pattern], sizes)[-1] ** 2
    return 2 * products * num_tokens
