"""Which channels of a head may go, against the rotary positions that stock code derives."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headstart.model.architecture import Architecture
from headstart.model.rotary import (
    Rope,
    head_channels,
    head_sizes,
    kept_pairs,
    rotary_pairs,
    student_rope,
)

GROUPS = 2
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def llama(head_dim: int, **rope: object) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2 * GROUPS, num_key_value_heads=GROUPS, head_dim=head_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0, **rope},
    )  # fmt: skip


def gpt_neox(head_dim: int, factor: float = 0.25, **rope: object) -> PretrainedConfig:
    return GPTNeoXConfig(
        vocab_size=8, hidden_size=GROUPS * head_dim, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=GROUPS, max_position_embeddings=64,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": factor, **rope
        },
    )  # fmt: skip


def rope_and_size(config: PretrainedConfig) -> tuple[Rope, int]:
    """What the functions of rotary positions are told of a teacher."""
    return config.rope_parameters, Architecture.of(config).sizes["head_dim"]


def stock_frequencies(config: PretrainedConfig) -> torch.Tensor:
    stock = {"llama": LlamaRotaryEmbedding, "gpt_neox": GPTNeoXRotaryEmbedding}
    return stock[config.model_type](config).inv_freq


def narrowed(config: PretrainedConfig, size: int) -> PretrainedConfig:
    """The stock config of the same teacher with another head size and nothing else changed."""
    make = llama if config.model_type == "llama" else gpt_neox
    shaped = make(size)
    shaped.rope_parameters = config.rope_parameters
    return shaped


TEACHERS = {
    "llama-2": llama(2),
    "llama-16": llama(16),
    "llama-24": llama(24),
    "neox-16": gpt_neox(16),
    "neox-24": gpt_neox(24),
    "neox-32": gpt_neox(32),
    "neox-all-turn": gpt_neox(12, 1.0),
    "neox-half-turns": gpt_neox(20, 0.5),
    "neox-rounded-down": gpt_neox(10, 0.45),
    "neox-odd-3": gpt_neox(12),
    "neox-odd-7": gpt_neox(28),
    "neox-odd-9": gpt_neox(36),
    "neox-one-channel": gpt_neox(4),
}
each_teacher = pytest.mark.parametrize("config", TEACHERS.values(), ids=TEACHERS)


@each_teacher
def test_pairs_are_the_frequencies_of_stock_code(config):
    assert rotary_pairs(*rope_and_size(config)) == len(stock_frequencies(config))


@each_teacher
def test_head_sizes_keep_the_share_that_turns(config):
    """All sizes for which stock code turns the same share of the head as the teacher's."""
    head_dim, pairs = Architecture.of(config).sizes["head_dim"], len(stock_frequencies(config))
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    step = 2 if config.model_type == "llama" else 1  # stock llama refuses odd sizes
    assert head_sizes(*rope_and_size(config)) == [
        size
        for size in range(step, head_dim + 1, step)
        if size * factor >= 1
        and len(stock_frequencies(narrowed(config, size))) * head_dim == pairs * size
    ]
    assert head_sizes(*rope_and_size(config))[-1] == head_dim


@each_teacher
@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_each_size_keeps_pairs_whose_frequencies_stock_code_derives(config, rope):
    config = type(config).from_dict(config.to_dict())
    config.rope_parameters = config.rope_parameters | rope
    teachers = stock_frequencies(config)
    pairs = len(teachers)
    for size in head_sizes(*rope_and_size(config)):
        channels = head_channels(*rope_and_size(config), size)
        assert len(channels) == size
        assert list(channels) == sorted(set(channels))
        kept = kept_pairs(*rope_and_size(config), channels)
        assert kept == [channel for channel in channels if channel < pairs]
        assert {channel + pairs for channel in kept} == set(channels) & set(range(pairs, 2 * pairs))
        assert kept[0] == 0
        student = narrowed(config, size)
        student.rope_parameters = student_rope(*rope_and_size(config), channels)
        torch.testing.assert_close(stock_frequencies(student), teachers[kept], rtol=1e-5, atol=0)


def test_pairs_are_spread_as_widely_as_they_fit():
    assert head_channels(*rope_and_size(llama(16)), 4) == (0, 4, 8, 12)
    assert head_channels(*rope_and_size(llama(16)), 6) == (0, 2, 4, 8, 10, 12)
    assert head_channels(*rope_and_size(llama(16)), 12) == (*range(6), *range(8, 14))
    assert head_channels(*rope_and_size(gpt_neox(32)), 16) == (0, 2, 4, 6, *range(8, 20))


def test_a_head_kept_whole_keeps_its_rotary_parameters():
    yarn = llama(16, rope_type="yarn", factor=2.0, original_max_position_embeddings=32)
    assert student_rope(*rope_and_size(yarn), tuple(range(16))) == yarn.rope_parameters


def test_consecutive_pairs_get_their_own_theta():
    """Pairs 0 to 3 of 8: 500,000^(4/8), so that four frequencies end where the teacher's do."""
    rope = student_rope(*rope_and_size(llama(16)), (0, 1, 2, 3, 8, 9, 10, 11))
    assert rope["rope_theta"] == pytest.approx(500_000**0.5)


@pytest.mark.parametrize(
    ("config", "channels", "message"),
    [
        (llama(8), (0, 1, 4, 6), "channel 1 without its rotary partner 5; keep both or neither"),
        (llama(8), (2, 5), "channel 2 without its rotary partner 6"),
        (llama(8), (0, 4, 7), "channel 7 without its rotary partner 3"),
        (gpt_neox(16), (0, 1, 2, *range(4, 9)), "channel 1 without its rotary partner 3"),
        (gpt_neox(16), (0, 2, 4, 5), r"keeps 4 .* of which 2 turn; .* share of 4 in 16"),
        (gpt_neox(16), tuple(range(4, 12)), r"keeps 8 .* of which 0 turn"),
        (gpt_neox(16), tuple(range(8)), r"keeps 8 .* of which 4 turn"),
        (llama(8), (1, 5), r"keeps rotary pairs \[1\].* evenly spaced"),
        (llama(8), (0, 1, 3, 4, 5, 7), r"keeps rotary pairs \[0, 1, 3\].* evenly spaced"),
        (llama(8), (1, 3, 5, 7), r"keeps rotary pairs \[1, 3\]"),
        (llama(8, rope_type="dynamic", factor=2.0), (0, 4), "kind 'dynamic', whose frequencies"),
        (llama(8, rope_type="yarn", factor=2.0), (0, 4), "kind 'yarn', whose .* keep heads whole"),
    ],
)
def test_what_cannot_be_expressed_is_refused(config, channels, message):
    with pytest.raises(ValueError, match=message):
        student_rope(*rope_and_size(config), channels)
