"""Recipes: round trip, overrides, and one sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from headstart.recipe import load_recipe, recipe_from_dict, recipe_to_dict

MINIMAL = {"teacher": "t", "output": "o"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_every_default_is_written_and_read_back() -> None:
    recipe = recipe_from_dict(MINIMAL)
    text = yaml.safe_dump(recipe_to_dict(recipe))
    assert recipe_from_dict(yaml.safe_load(text)) == recipe


def test_values_reach_their_dataclasses(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "teacher: t\noutput: o\n"
        "search: {bin: {around: 25M}, evolution: {population: 7}}\n"
        "pretrain:\n  arms:\n    - {name: a, learning_rate: 1e-3, kd: {alpha: 1}}\n"
        "train: {max_grad_norm: 0.5}\n",
    )
    recipe = load_recipe(path)
    assert recipe.search.bin.around == "25M"
    assert recipe.search.evolution.population == 7
    (arm,) = recipe.pretrain.arms
    assert (arm.learning_rate, arm.kd and arm.kd.alpha, arm.kd and arm.kd.beta) == (1e-3, 1.0, 0.5)
    assert recipe.train == {"max_grad_norm": 0.5}


def test_overrides_win_and_data_is_short_for_its_source(tmp_path: Path) -> None:
    path = write(tmp_path, "teacher: t\noutput: o\nsearch: {tokens: 5}\n")
    overrides = ["--search.tokens", "9", "--data=corpus.txt", "--train.learning_rate_x", "0.1"]
    recipe = load_recipe(path, overrides)
    assert recipe.search.tokens == 9
    assert recipe.data.source == "corpus.txt"
    assert recipe.train == {"learning_rate_x": 0.1}


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "teacher: t\noutput: o\ntrain: {weight_decay: 1e-2, name: 1e-3x}\n")
    recipe = load_recipe(path, ["--train.adam_epsilon", "1e-8", "--train.b", "-2.5E3"])
    assert recipe.train == {"weight_decay": 0.01, "name": "1e-3x", "adam_epsilon": 1e-8, "b": -2500}


def test_recipe_is_optional() -> None:
    assert load_recipe(None, ["--teacher", "t", "--output", "o"]) == recipe_from_dict(MINIMAL)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--search.populaton", "3"], "unknown key search.populaton"),
        (["--search.evolution.populaton", "3"], "did you mean search.evolution.population?"),
        (
            ["--pretrain.arms", "[{name: a, lerning_rate: 1}]"],
            "mean pretrain.arms[0].learning_rate",
        ),
        (["--xyzzy", "1"], "known: teacher, output"),
        (["--search.evolution.population", "many"], "'many'; write a whole number"),
        (["--search.evolution.population", "0"], "population is 0; use at least 1"),
        (["--search.evolution.mutation", "0.9"], "nor their sum above 1"),
        (["--search.space", "huge"], "choose one of coarse-uniform, fine-uniform"),
        (["--search.unit_noise", "2"], "it must be in [0, 1]"),
        (["--search.tokens", "0"], "search.tokens is 0"),
        (["--pretrain.tokens", "-5"], "pretrain.tokens is -5"),
        (["--pretrain.tokens", "true"], "pretrain.tokens is True; write a whole number"),
        (["--pretrain.arms", "3"], "pretrain.arms is 3; write a list"),
        (["--pretrain.arms", "[]"], "give at least one arm"),
        (["--pretrain.arms", "[{name: a}, {name: a}]"], "each with a name of its own"),
        (["--pretrain.arms", "[{init: subnet}]"], "pretrain.arms[0].name is missing"),
        (["--pretrain.arms", "[{name: a/b}]"], "cannot be a folder's name"),
        (["--pretrain.arms", '[{name: "a\\nb"}]'], "cannot be a folder's name"),
        (["--pretrain.arms", "[{name: ' '}]"], "cannot be a folder's name"),
        (["--pretrain.arms", f"[{{name: {'a' * 201}}}]"], "is too long; use at most 200 bytes"),
        (["--pretrain.seeds", "[-1]"], "pretrain.seeds holds -1; use 0 to 4294967295"),
        (["--pretrain.seeds", "[4294967296]"], "pretrain.seeds holds 4294967296; use 0 to"),
        (["--data.mixture", "[{source: s, weight: 1e308}]"], "weight 1e+308: use at most 1e+09"),
        (["--search.bin", "{low: 1, low: 2}"], "is not valid YAML"),
        (["--pretrain.arms", "[{name: a, learning_rate: 0}]"], "must be above 0"),
        (
            ["--pretrain.arms", "[{name: a, learning_rate: .inf}]"],
            "pretrain.arms[0].learning_rate is inf; write a finite number",
        ),
        (["--pretrain.arms", "[{name: a, kd: {alpha: .nan}}]"], "kd.alpha is nan; write a finite"),
        (["--search.unit_noise", "-.inf"], "search.unit_noise is -inf; write a finite number"),
        (["--search.tokens", ".inf"], "search.tokens is inf; write a finite number"),
        (["--train", "{weight_decay: .nan}"], "train.weight_decay is nan; write a finite number"),
        (
            ["--train", "{optim_args: {eps: [1, .nan]}}"],
            "train.optim_args.eps[1] is nan; write a finite number",
        ),
        (
            ["--pretrain.arms", "[{name: a, train: {lr_scheduler_kwargs: {x: .inf}}}]"],
            "pretrain.arms[0].train.lr_scheduler_kwargs.x is inf; write a finite number",
        ),
        (
            ["--search.evolution", "{population: 3, elites: 4}"],
            "search.evolution.elites is 4, more than the population of 3; use at most so many",
        ),
        (["--pretrain.arms", "[{name: a, kd: {temperature: 0}}]"], "temperature is 0"),
        (["--pretrain.arms", "[{name: a, kd: {alpha: 0, beta: 0}}]"], "nor both 0"),
        (["--pretrain", "3"], "write keys and values below it"),
        (["--train", "3"], "write keys and values below it"),
        (["--teacher", ""], "the recipe has no teacher"),
        (["--data.source.deep", "1"], "source holds no keys"),
        (["--search.tokens"], "has no value"),
        (["--search.bin", "{low: 1M"], "is not valid YAML"),
        (["search.tokens"], "is not an option"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    path = write(tmp_path, "teacher: t\noutput: o\ndata: {source: s}\n")
    with pytest.raises(ValueError) as caught:
        load_recipe(path, overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("teacher: [t\n", "not valid YAML at line 2"),
        ("teacher: t\nteacher: u\n", "line 2, column 1 (teacher stands twice); mend it"),
        ("data:\n  seed: 1\n  seed: 1\n", "line 3, column 3 (seed stands twice); mend it"),
        ("teacher: t\nstudent: 2024-13-01\n", "line 2, column 10 (month must be in 1..12)"),
        (f"teacher: t\nstudent: {'9' * 5000}\n", "line 2, column 10 (Exceeds the limit"),
        ("train: &t\n  lr_scheduler_kwargs: {a: *t}\n", "recipe.yaml holds an alias of itself"),
        ("teacher: " + "[" * 3000, "not valid YAML; mend it"),
        ('teacher: "a\\0b"\n', "teacher is 'a\\x00b'; remove the zero byte"),
        ("- a list\n", "holds no keys"),
        ("", "has no teacher"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(write(tmp_path, text))
    assert sentence in str(caught.value)


def test_keys_that_a_merge_overrides_do_not_stand_twice(tmp_path: Path) -> None:
    text = "teacher: t\noutput: o\ndata: &d {seed: 1}\nsearch: {evolution: {<<: *d, seed: 2}}\n"
    assert load_recipe(write(tmp_path, text)).search.evolution.seed == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")
