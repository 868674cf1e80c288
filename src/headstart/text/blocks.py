"""Token blocks: what to read, and the prepared corpus on disk, memory-mapped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt
from torch import Tensor

from headstart.system.errors import UserError
from headstart.text.mixture import MixedBlocks
from headstart.text.settings import SPLITS, SplitName


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Of token ids on disk."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class TokenBlocks:
    """A prepared corpus on disk, or a mixture of several.

    Attributes:
        folder: Holds manifest.json and, for each split, train.bin and so on; a mixture has .npy
            files of the order instead.
        manifest: The content of manifest.json. `manifest["splits"][name]` counts documents,
            text_bytes and tokens (both before the ragged tail was dropped) and blocks.
        separate_documents: As in the settings.
    """

    folder: Path
    manifest: dict[str, Any]
    separate_documents: bool = False

    @property
    def fingerprint(self) -> str:
        """Of the tokens, and of which of them a token sees."""
        seen = "-separate" if self.separate_documents else ""
        return f"{self.manifest['fingerprint']}{seen}"

    def bytes_per_token(self, name: SplitName) -> float:
        """UTF-8 bytes of a split's text for each of its tokens, ends of documents included."""
        counts = self.manifest["splits"][name]
        return float(counts["text_bytes"] / counts["tokens"])

    @property
    def separator(self) -> int | None:
        """The token after which attention begins anew; None where it does not."""
        return self.manifest["end_token"] if self.separate_documents else None

    def split(self, name: SplitName) -> UInt[np.ndarray, "num_blocks block_length"] | MixedBlocks:
        """Memory-map the token ids of one split, read-only.

        Raises:
            UserError: There is no such split, or it has no share of the text.
        """
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}: choose one of {', '.join(SPLITS)}")
        if "parts" in self.manifest:
            folders = [self.folder.parent / part["folder"] for part in self.manifest["parts"]]
            parts = [finished_blocks(folder) for folder in folders]
            if None in parts:
                raise UserError(f"a corpus of the mixture in {self.folder} is gone: run again")
            arrays: Any = [part.split(name) for part in parts if part]
            return MixedBlocks(arrays, np.load(self.folder / f"{name}.npy", mmap_mode="r"))
        shape = (self.manifest["splits"][name]["blocks"], self.manifest["settings"]["block_length"])
        if not shape[0]:
            raise UserError(f"the {name} split has no share of the text: mend data.*_fraction")
        dtype = np.dtype(self.manifest["dtype"])
        return np.memmap(self.folder / f"{name}.bin", dtype=dtype, mode="r", shape=shape)

    def spread(self, name: SplitName, num_tokens: int) -> MixedBlocks:
        """Blocks from all over a split: at least so many tokens of it, or all that it has.

        A split's first blocks are those of its first file. These lie at even distances, and in an
        order in which those of any beginning do so too, so that few tokens stand for the split as
        well as they can.
        """
        array = self.split(name)
        count = min(-(-num_tokens // array.shape[1]), len(array))
        rows = [place * len(array) // count for place in halving_order(count)]
        order = np.column_stack([np.zeros(count, int), np.array(rows, int)])
        return MixedBlocks([array], order)

    def sample(self, name: SplitName, num_tokens: int) -> Int[torch.Tensor, "blocks tokens"]:
        """The token ids of `spread`, in memory."""
        return torch.from_numpy(self.spread(name, num_tokens)[:].astype(np.int64))


def halving_order(count: int) -> list[int]:
    """The numbers below a count, so that those of any beginning are at about even distances.

    Source: the radical inverse in base 2 (van der Corput, 1935).

    >>> halving_order(8), halving_order(5)
    ([0, 4, 2, 6, 1, 5, 3, 7], [0, 4, 2, 1, 3])
    """
    order, num_bits = [0], max(0, count - 1).bit_length()
    for bit in range(num_bits):
        order += [place + (1 << num_bits - 1 - bit) for place in order]
    return [place for place in order if place < count]


class BlockDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The blocks of one split as a torch dataset.

    Args:
        blocks: Token ids, such as `TokenBlocks.split` gives.
        order: The place of each item's block among them; every block once, in its place, when None.
        separator: The token after which positions begin anew, and attention with them; items then
            have "position_ids" too.
    """

    def __init__(
        self,
        blocks: UInt[np.ndarray, "num_blocks block_length"] | MixedBlocks,
        order: Int64[np.ndarray, " items"] | None = None,
        separator: int | None = None,
    ) -> None:
        self.blocks, self.order, self.separator = blocks, order, separator

    def __len__(self) -> int:
        return len(self.blocks if self.order is None else self.order)

    def block(self, index: int) -> UInt[np.ndarray, " block_length"]:
        """The block of an item."""
        block: UInt[np.ndarray, " block_length"] = self.blocks[
            index if self.order is None else int(self.order[index])
        ]
        return block

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One block, int64 [block_length]; labels are the ids, as the shift is the loss's job."""
        token_ids = torch.from_numpy(self.block(index).astype(np.int64))
        item = {"input_ids": token_ids, "labels": token_ids}
        if self.separator is not None:
            item["position_ids"] = document_positions(token_ids, self.separator)
        return item


def document_positions(
    blocks: Int[Tensor, "*batch tokens"], separator: int
) -> Int[Tensor, "*batch tokens"]:
    """The place of each token in its document, which the separator ends.

    By these, transformers lets no token see another document's.

    >>> document_positions(torch.tensor([7, 8, 1, 9, 1, 1, 5]), separator=1).tolist()
    [0, 1, 2, 0, 1, 0, 0]
    """
    places = torch.arange(blocks.shape[-1], device=blocks.device).expand(blocks.shape)
    begins = torch.zeros_like(blocks, dtype=torch.bool)
    begins[..., 1:] = blocks[..., :-1] == separator
    return places - torch.where(begins, places, 0).cummax(dim=-1).values


def finished_blocks(folder: Path) -> TokenBlocks | None:
    """The prepared corpus in a folder, if its files are as long as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        item_bytes = np.dtype(manifest["dtype"]).itemsize
        block_bytes = manifest["settings"]["block_length"] * item_bytes
        for name in SPLITS:
            expected_bytes = manifest["splits"][name]["blocks"] * block_bytes
            if (folder / f"{name}.bin").stat().st_size != expected_bytes:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenBlocks(folder, manifest)
