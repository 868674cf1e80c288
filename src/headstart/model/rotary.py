"""Heads cut narrower: which channels may go, and how the kept ones keep their rotary frequencies.

A head's first channels turn in pairs: with P pairs, channel i and channel i + P by the frequency
theta^(-i/P), for i < P. Channels after 2P, where there are any, do not turn. A narrower head keeps
both channels of a pair or neither. Stock code would derive new frequencies from the new size; the
student's theta is therefore chosen so that what it derives are the frequencies that were kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headstart.system.errors import UserError

ELEMENTWISE_ROPE = ("default", "linear", "llama3")
"""Kinds of rotary position that scale each frequency by itself, whatever the head size."""


Rope = Mapping[str, Any]
"""A config's `rope_parameters`."""


def rotary_pairs(rope: Rope, head_dim: int) -> int:
    """Pairs of channels that turn, in one head."""
    return (_turning_width(rope, head_dim) + 1) // 2


def _turning_width(rope: Rope, head_dim: int) -> int:
    """What stock code divides by to derive frequencies; it rounds odd widths up to whole pairs."""
    return int(head_dim * (rope.get("partial_rotary_factor") or 1.0))


def head_sizes(rope: Rope, head_dim: int) -> list[int]:
    """The head sizes that keep the teacher's share of turning channels, ascending.

    Where kinds of layers turn by different frequencies, heads stay whole.

    >>> quarter = {"rope_type": "default", "partial_rotary_factor": 0.25}
    >>> head_sizes(quarter, head_dim=32)  # a quarter of 32 channels turns: four pairs
    [8, 16, 24, 32]
    """
    pairs = rotary_pairs(rope, head_dim)
    if "rope_type" not in rope:  # one for each kind of layer
        return [head_dim]
    sizes = [head_dim * kept // pairs for kept in range(1, pairs + 1)]
    return [
        size
        for kept, size in enumerate(sizes, 1)
        if head_dim * kept % pairs == 0 and rotary_pairs(rope, size) == kept
    ]


def head_channels(rope: Rope, head_dim: int, size: int) -> tuple[int, ...]:
    """The channels that a head of this size keeps: pairs at an even stride, then the rest.

    The widest stride that fits spans fast and slow frequencies alike; it starts at the fastest.
    """
    pairs, kept = rotary_pairs(rope, head_dim), rotary_pairs(rope, size)
    firsts = [pair * (pairs // kept) for pair in range(kept)]
    rest = range(2 * pairs, 2 * pairs + size - 2 * kept)
    channels = (*firsts, *(first + pairs for first in firsts), *rest)
    assert size in head_sizes(rope, head_dim) and channels[-1] < head_dim
    return channels


def kept_pairs(rope: Rope, head_dim: int, channels: tuple[int, ...]) -> list[int]:
    """The rotary pairs among a head's kept channels, ascending.

    Raises:
        UserError: a pair is torn apart, the share of turning channels is not the teacher's, or
            frequencies depend on the head size.
    """
    pairs, kept = rotary_pairs(rope, head_dim), set(channels)
    if "rope_type" not in rope and len(channels) < head_dim:
        raise UserError(
            "the teacher's kinds of layers turn by different frequencies, so its heads cannot be "
            "narrower; keep them whole (search.grid.head_dim_min 0)"
        )
    for channel in channels:
        partner = channel + pairs if channel < pairs else channel - pairs
        if channel < 2 * pairs and partner not in kept:
            raise UserError(
                f"the spec keeps head_dim channel {channel} without its rotary partner {partner}; "
                "keep both or neither"
            )
    if len(channels) not in head_sizes(rope, head_dim) or rotary_pairs(rope, len(channels)) != sum(
        channel < pairs for channel in channels
    ):
        raise UserError(
            f"the spec keeps {len(channels)} head_dim channels, of which "
            f"{sum(channel < 2 * pairs for channel in channels)} turn; keep the teacher's share of "
            f"{2 * pairs} in {head_dim}"
        )
    kind = rope.get("rope_type")
    if len(channels) < head_dim and kind not in ELEMENTWISE_ROPE:
        raise UserError(
            f"the teacher's rotary positions are of kind {kind!r}, whose frequencies depend on the "
            "head size; keep heads whole (search.grid.head_dim_min 0)"
        )
    return [channel for channel in channels if channel < pairs]


def student_rope(rope: Rope, head_dim: int, channels: tuple[int, ...]) -> dict[str, Any]:
    """The stock rotary parameters whose frequencies are those of the kept pairs.

    Raises:
        UserError: no stock parameters give these frequencies.
    """
    pairs, kept = rotary_pairs(rope, head_dim), kept_pairs(rope, head_dim, channels)
    if len(kept) == pairs:
        return dict(rope)
    stride = kept[1] - kept[0] if len(kept) > 1 else 1
    if kept != list(range(0, stride * len(kept), stride)):
        raise UserError(
            f"the spec keeps rotary pairs {kept}, and stock code knows evenly spaced frequencies "
            "from pair 0 on only; keep pairs 0, s, 2s and so on"
        )
    narrow, whole = (_turning_width(rope, width) for width in (len(channels), head_dim))
    return {**rope, "rope_theta": rope["rope_theta"] ** (stride * narrow / whole)}
