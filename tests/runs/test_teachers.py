"""Arms that distil from models of their own choice, beside those that distil from what was cut."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import padded, random_teacher
from tests.runs.conftest import BLOCK_LENGTH, answer
from transformers import AutoModelForCausalLM, AutoTokenizer

from headstart.cli import main
from headstart.evaluation.scores import text_loss
from headstart.model.checkpoint import Checkpoint
from headstart.recipe import load_recipe, recipe_from_dict, recipe_to_dict
from headstart.runs.ahead import run_cache_teacher
from headstart.runs.plan import planned_text, print_plans
from headstart.runs.stages import run_recipe
from headstart.runs.teachers import checked_teachers, planned_teachers
from headstart.system.errors import UserError
from headstart.system.files import shipped
from headstart.text.prepare import prepare
from headstart.text.settings import DataSettings
from headstart.training.plan import Hardware

LAYERS, ROWS = 6, 136


@pytest.fixture
def larger(teacher_folder: Path, tmp_path: Path) -> Path:
    """A deeper sibling of the teacher with more padding, another end token and a chat template."""
    config = copy.deepcopy(random_teacher("llama-tied-gqa").config)
    config.num_hidden_layers = LAYERS
    torch.manual_seed(3)
    model = padded(AutoModelForCausalLM.from_config(config), ROWS)
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path / "larger")
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "larger")
    return tmp_path / "larger"


@pytest.fixture
def tree(recipe: dict[str, Any], larger: Path, tmp_path: Path) -> dict[str, Any]:
    """The small recipe with arms that learn from a larger model, from the cut one, and of both from
    a cache."""
    recipe["search"] |= {"init": "slice", "scored_as": "slice", "calibration_tokens": 256}
    recipe["search"]["evolution"] = {"population": 2, "generations": 1, "elites": 1}
    cached = {"top_k": 8, "cache": str(tmp_path / "cached")}
    recipe["pretrain"] |= {
        "tokens": 384,
        "evaluations": 1,
        "arms": [
            {"name": "cut", "kd": {}},
            {"name": "larger", "kd": {"teacher": str(larger)}},
            {"name": "larger, cached", "kd": {"teacher": str(larger), **cached}},
        ],
    }
    return recipe


def inference_flops(layers: int, rows: int) -> int:
    """Of a token, by hand: two for each weight of the layers' matrices and of the output matrix,
    and attention's two products over the block."""
    embed, heads, groups, head_dim, mlp = 48, 6, 2, 16, 80
    matrices = embed * head_dim * (2 * heads + 2 * groups) + 3 * embed * mlp
    return layers * (2 * matrices + 4 * heads * head_dim * BLOCK_LENGTH) + 2 * rows * embed


def test_each_arm_learns_from_its_own_teacher_and_pays_for_it(
    tree: dict[str, Any], larger: Path, tmp_path: Path
) -> None:
    (result,) = run_recipe(recipe_from_dict(tree))
    cut, online, cached = result["arms"]
    assert cut["flops"]["teacher"] == 384 * inference_flops(4, 128)
    for arm in (online, cached):
        assert arm["flops"]["teacher"] == 384 * inference_flops(LAYERS, ROWS)
        assert arm["kd"]["teacher"] == str(larger)
    assert cut["loss_final"] != online["loss_final"]
    (other,) = result["other_teachers"]
    checkpoint = Checkpoint.open(larger)
    assert (other["name"], other["hash"]) == (str(larger), checkpoint.hash)
    assert (other["shared_rows"], other["flops_per_token"]) == (128, inference_flops(LAYERS, ROWS))
    text = prepare(DataSettings(**tree["data"]), tree["teacher"])
    assert other["loss"] == pytest.approx(text_loss(checkpoint, text, 10**6, "test")["loss"])
    folder = Path(tree["output"])
    assert json.loads((folder / "inputs.json").read_text())[f"kd.teacher {larger}"] == (
        checkpoint.hash
    )
    manifest = json.loads((tmp_path / "cached" / "cache.json").read_text())
    assert (manifest["teacher"], manifest["shared_rows"]) == (checkpoint.hash, 128)
    card = (folder / "arms" / "larger" / "model" / "README.md").read_text()
    assert f"from {larger} at temperature 1" in card
    # The same command again trains nothing; another model in its place is refused.
    before = answer(folder)
    run_recipe(recipe_from_dict(tree))
    assert answer(folder) == before
    model = AutoModelForCausalLM.from_pretrained(larger)
    torch.nn.init.ones_(model.model.norm.weight)
    model.model.norm.weight.data += 1
    model.save_pretrained(larger)
    with pytest.raises(UserError, match=f"the kd.teacher {larger} has changed since"):
        run_recipe(recipe_from_dict(tree))


@pytest.mark.exhaustive
def test_a_job_for_each_arm_gives_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    run_recipe(recipe_from_dict(tree))
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump({**tree, "output": str(tmp_path / "jobs")}))
    assert main(["cache-teacher", str(file)]) == 0
    for arm in ("larger, cached", "larger", "cut"):
        assert main(["run", str(file), "--arm", arm]) == 0
    assert answer(tmp_path / "jobs") == answer(Path(tree["output"]))


def test_a_cache_is_of_one_teacher(tree: dict[str, Any]) -> None:
    written = run_cache_teacher(recipe_from_dict(tree))
    tree["pretrain"]["arms"][2]["kd"].pop("teacher")
    with pytest.raises(UserError, match="was written for another teacher"):
        run_cache_teacher(recipe_from_dict(tree))
    tree["pretrain"]["arms"][1]["kd"] |= {"top_k": 8, "cache": next(iter(written))}
    with pytest.raises(UserError, match=r"same kd.cache .* or other teachers; give one of them"):
        run_recipe(recipe_from_dict(tree))


@pytest.mark.parametrize("size", [96, 142])
def test_a_teacher_loses_the_tokens_that_the_cut_model_loses(
    tree: dict[str, Any], larger: Path, tmp_path: Path, size: int
) -> None:
    """Row by row. Of the larger size fourteen rows of padding are left, of which the teacher has
    eight."""
    wide = tmp_path / "wide"
    padded(random_teacher("llama-tied-gqa"), 144).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tree["teacher"]).save_pretrained(wide)
    tree |= {"teacher": str(wide), "vocabulary": {"size": size}}
    loaded = recipe_from_dict(tree)
    (manifest,) = run_cache_teacher(loaded).values()
    (cut,) = (tmp_path / "cache" / "trimmed").glob("*/teacher")
    kept = json.loads((cut / "vocabulary.json").read_text())
    (folder,) = (tmp_path / "cache" / "trimmed-alike").glob("*/teacher")
    assert manifest["teacher"] == Checkpoint.open(folder).hash
    left = [id for id in kept if id < ROWS]
    rows = [load_file(place / "model.safetensors") for place in (folder, larger)]
    name = "model.embed_tokens.weight"
    torch.testing.assert_close(rows[0][name], rows[1][name][left], rtol=0, atol=0)
    assert manifest["shared_rows"] == sum(id < 128 for id in kept) == min(size, 128)
    assert planned_teachers(loaded)[str(larger)].config.vocab_size == min(size, ROWS)
    assert run_cache_teacher(loaded) == {str(tmp_path / "cached"): manifest}


def test_mistakes_are_told_before_the_text_is_read(
    tree: dict[str, Any], larger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.runs.run.prepare", lambda *a, **k: pytest.fail("text was read"))
    other, kd = tmp_path / "other", tree["pretrain"]["arms"][1]["kd"]
    kd |= {"teacher": str(other), "top_k": 129}
    shutil.copytree(larger, other)

    def refused(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence) as caught:
            run_recipe(recipe_from_dict(tree))
        assert "\n" not in str(caught.value)

    refused("kd.top_k is 129 and the teacher has 128 tokens; use fewer")
    del kd["top_k"]
    path = other / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = dict(rules["model"]["vocab"])
    a, b = list(vocabulary)[-2:]
    vocabulary |= {a: vocabulary[b], b: vocabulary[a]}
    path.write_text(json.dumps({**rules, "model": {**rules["model"], "vocab": vocabulary}}))
    refused("has another tokenizer than .*, which is cut; distil from a model of the same")
    path.write_text(json.dumps({**rules, "normalizer": {"type": "Lowercase"}}))
    refused("has another tokenizer")
    path.write_text(json.dumps(rules))
    model = random_teacher("llama-tied-gqa")
    model.resize_token_embeddings(120)
    model.save_pretrained(other)
    refused("has 120 vocabulary rows and the model that is cut 128, and their tokenizer has 128")


def test_a_teacher_may_have_tokens_more(tree: dict[str, Any], larger: Path) -> None:
    """As a later version of a family has, for tools; no text of the cut model's spells them."""
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(larger)
    loaded = recipe_from_dict(tree)
    found = checked_teachers(loaded, loaded, Checkpoint.open(tree["teacher"]))
    assert found[str(larger)].shared_rows == 128


def test_the_plan_is_of_each_arms_teacher(tree: dict[str, Any], larger: Path) -> None:
    loaded = recipe_from_dict(tree)
    ((cut, online, cached),) = print_plans(loaded, Hardware())
    assert cut.teacher_flops == cut.tokens * inference_flops(4, 128)
    for plan in (online, cached):
        assert plan.teacher_flops == plan.tokens * inference_flops(LAYERS, ROWS)
    weights = [
        2 * sum(parameter.numel() for parameter in model.parameters())
        for model in map(AutoModelForCausalLM.from_pretrained, (tree["teacher"], larger))
    ]
    assert [plan.memory.teacher for plan in (cut, online, cached)] == [*weights, 0]
    text = planned_text(loaded, planned_teachers(loaded))
    (flops,), (tokens,) = text.cache_flops.values(), text.cached_tokens.values()
    assert flops == tokens * inference_flops(LAYERS, ROWS)


@pytest.mark.exhaustive
def test_the_example_recipe(tree: dict[str, Any], larger: Path, tmp_path: Path) -> None:
    """With small models in the places of those that it names."""
    example = recipe_to_dict(load_recipe(shipped("larger_teacher.yaml")))
    places = {"Qwen/Qwen2.5-7B": larger, "Qwen/Qwen2.5-7B-Instruct": larger}
    for arm in example["pretrain"]["arms"]:
        if arm["kd"] and arm["kd"]["teacher"]:
            arm["kd"]["teacher"] = str(places[arm["kd"]["teacher"]])
    pretrain = {**tree["pretrain"], "arms": example["pretrain"]["arms"]}
    small = {key: tree[key] for key in ("teacher", "output", "data", "search", "train")}
    (result,) = run_recipe(recipe_from_dict({**example, **small, "pretrain": pretrain}))
    scratch, same, larger_arm, instruct = result["arms"]
    assert scratch["flops"]["teacher"] == 0 < same["flops"]["teacher"]
    assert larger_arm["loss_final"] == instruct["loss_final"] != same["loss_final"]
