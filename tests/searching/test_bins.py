"""Bins are read from amounts and from models, in every measure."""

from pathlib import Path

import pytest
import torch
from tests.conftest import random_teacher
from transformers import AutoModelForCausalLM

from headstart.model.architecture import Architecture
from headstart.searching.bins import Bin, BinSettings
from headstart.system.formats import parse_count

MEASURES = ("parameters", "flops_per_token", "kv_cache_bytes_per_token", "weight_bytes")


def test_counts_are_read() -> None:
    texts: list[int | str] = [7, "12", "1_000", "385M", "1.5k", "2b", "2G", "0.5t", "1_0.5K"]
    numbers = [7, 12, 1000, 385 * 10**6, 1500, 2 * 10**9, 2 * 10**9, 5 * 10**11, 10_500]
    assert list(map(parse_count, texts)) == numbers
    for text in ["", "M", "-5", -5, "1.5.2M", "4X", "4MB", "1 M", "1e9", "1_", "nan"]:
        with pytest.raises(ValueError, match="is not a count"):
            parse_count(text)


@pytest.mark.parametrize("measure", MEASURES)
def test_amounts_are_read_in_their_measure(measure) -> None:
    given = BinSettings(low="385M", high=426_000_000, measure=measure).resolve(64)
    assert given == Bin(385 * 10**6, 426 * 10**6, measure, 64)
    around = BinSettings(around="410M", tolerance=0.1, measure=measure).resolve(64)
    assert around == Bin(369 * 10**6, 451 * 10**6, measure, 64)
    assert Bin.around(410_000_000, 0.1, measure, 64) == around


@pytest.mark.parametrize("kind", ["llama-untied-gqa", "gpt_neox-tied"])
def test_a_model_is_measured(kind: str, tmp_path: Path) -> None:
    """Against a real model of the same config, held at that precision."""
    random_teacher(kind).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    config_only = tmp_path / "config"
    config_only.mkdir()
    (config_only / "config.json").write_text((tmp_path / "model/config.json").read_text())
    with torch.no_grad():
        cache = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    amounts = {
        "parameters": model.num_parameters(),
        "flops_per_token": Architecture.of(model.config).count(64).inference_flops_per_token,
        "kv_cache_bytes_per_token": held // 8,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    for measure, amount in amounts.items():
        settings = BinSettings(around=str(config_only), tolerance=0, measure=measure)
        assert settings.resolve(64) == Bin(amount, amount, measure, 64)
        wide = BinSettings(around=str(config_only), tolerance=0.25, measure=measure).resolve(64)
        assert wide == Bin(round(amount * 0.75), round(amount * 1.25), measure, 64)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"around": "410M"}, "410M"),
        ({"around": 410_000_000}, "410000000"),
        ({"low": "385M", "high": "426M"}, "385M-426M"),
        ({"low": 1, "high": "1_000"}, "1-1_000"),
        ({"around": "1.4B", "name": "the small one"}, "the-small-one"),
        ({"around": "some/model-1.4b"}, "some-model-1.4b"),
        ({"around": "../models/one/"}, "models-one"),
        ({"around": "/models/one"}, "models-one"),
    ],
)
def test_a_bins_folder_has_a_plain_name(settings: dict[str, int | str], label: str) -> None:
    assert BinSettings(**settings).label() == label


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either low and high"),
        ({"low": 1, "high": 2, "around": 3}, "either low and high"),
        ({"high": 2, "around": "3M"}, "either low and high"),
        ({"low": "2M"}, "empty"),
        ({"high": "2M"}, "empty"),
        ({"low": "2M", "high": "1M"}, "the bin 2,000,000 to 1,000,000 is empty"),
        ({"low": "many", "high": "2M"}, "'many' is not a count"),
        ({"around": "2M", "tolerance": 1}, "tolerance is 1"),
        ({"around": "2M", "tolerance": -0.1}, "tolerance is -0.1"),
        ({"around": "/no/such/model"}, "'/no/such/model' is neither a count such as 410M nor"),
    ],
)
def test_errors_tell_the_mistake(settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        BinSettings(**settings).resolve(64)
    assert "\n" not in str(caught.value)
