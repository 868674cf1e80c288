"""Students refitted on what they compute, against normal equations from whole forward passes."""

import copy

import pytest
import torch
from tests.conftest import DESCENDANTS, TEACHERS, random_teacher
from tests.model.oracles import assert_same_tensors, random_layerwise_spec, random_spec

from headstart.calibration.activations import TeacherPass, can_propagate
from headstart.calibration.least_squares import refitted
from headstart.calibration.moments import Statistics, collect_statistics
from headstart.calibration.propagate import propagated
from headstart.model.architecture import Architecture
from headstart.model.axes import kept_indices
from headstart.model.cut import build_student
from headstart.model.spec import SubnetSpec

KINDS = [kind for kind in [*TEACHERS, *DESCENDANTS] if not kind.startswith(("gemma3", "olmo2"))]
PRIOR_TOKENS = 2
CUT = {"layers": 3, "embed": 32, "kv_groups": 1, "mlp": 40}


@pytest.fixture
def tokens():
    return torch.randint(1, 128, (16, 20), generator=torch.Generator().manual_seed(0))


def refit(teacher, spec, tokens, folder):
    """The student as it was cut and refitted by its teacher's statistics, and what changed."""
    folder.mkdir()
    collect_statistics(teacher, tokens.split(8), folder)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    architecture = Architecture.of(teacher.config)
    tensors = refitted(state.items(), architecture, spec, Statistics(folder))
    cut = build_student(tensors, architecture, spec)
    cut.load_state_dict({name: tensor.clone() for name, tensor in cut.state_dict().items()})
    tensors = {name: tensor.detach().clone() for name, tensor in cut.named_parameters()}
    student = copy.deepcopy(cut)
    parts = (TeacherPass(teacher, tokens.split(5)), student, tensors, spec)
    return cut, student, dict(propagated(*parts, prior_tokens=PRIOR_TOKENS))


def last_norm(model):
    """The name of the weight of the norm before the output matrix."""
    return next(norm for norm in Architecture.of(model.config).family.readers if "{i}" not in norm)


@torch.no_grad()
def watched(model, tokens):
    """Inputs and outputs of all linear layers and layers in one pass, by module, in float64."""
    model, seen = copy.deepcopy(model).double(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or "layers." in name:
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.update(
                    {name: (inputs[0].flatten(0, 1) if inputs else None, output)}
                )
            )
    model(tokens)
    return {name: (x, y.flatten(0, 1)) for name, (x, y) in seen.items() if torch.is_tensor(y)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_solves_its_ridge_regression(kind, tokens, tmp_path):
    teacher = random_teacher(kind)
    spec = random_spec(teacher, **CUT)
    cut, student, changed = refit(teacher, spec, tokens, tmp_path / "statistics")
    whole, small = watched(teacher, tokens), watched(student, tokens)
    architecture = Architecture.of(teacher.config)
    layouts, sizes = architecture.layouts, architecture.sizes
    layer_name = architecture.family.layer
    keep, checked = list(spec.embed), set()
    follow = (*spec.layers[1:], sizes["layers"])
    streams = [whole[layer_name.format(i=i)] for i in range(sizes["layers"])]
    for position, (layer, following) in enumerate(zip(spec.layers, follow, strict=True)):
        written = torch.zeros(())
        for pattern, layout in layouts.items():
            if "{i}" not in pattern or len(layout.split(" if ")[0].split()) < 2:
                continue
            if not pattern.endswith("weight"):
                continue
            ours, theirs = (pattern.format(i=i).removesuffix(".weight") for i in (position, layer))
            x = small[ours][0]
            if layout.endswith(" embed"):
                rows = kept_indices(layouts[pattern], sizes, spec.kept_in_layer(position))[0]
                wanted = whole[theirs][1][:, rows]
            else:  # what the stream is to be after it, less what is there
                stream = streams[layer][0][:, keep] - small[layer_name.format(i=position)][0]
                if pattern.split(".")[-2] in ("down_proj", "dense_4h_to_h"):
                    after = (*[x for x, _ in streams[1:]], streams[-1][1])[following - 1]
                    wanted = after[:, keep] - small[layer_name.format(i=position)][0] - written
                else:
                    wanted = whole[theirs][1][:, keep] + stream
                    written = small[ours][1]
            names = [f"{ours}.{kind}" for kind in ("weight", "bias") if f"{ours}.{kind}" in changed]
            before, after = (
                torch.column_stack([parts[name].double() for name in names])
                for parts in (dict(cut.named_parameters()), changed)
            )
            if len(names) == 2:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
            gram, ridge = x.T @ x / len(x), torch.zeros(x.shape[1], dtype=x.dtype)
            num_inputs = small[ours][0].shape[1]
            ridge[:num_inputs] = PRIOR_TOKENS / tokens.numel() * gram.diagonal()[:num_inputs].mean()
            gradient = (x @ after.T - wanted).T @ x / len(x) + (after - before) * ridge
            scale = (wanted.T @ x / len(x)).abs().max()
            assert gradient.abs().max() < 1e-4 * scale, pattern
            checked |= set(names)
    outside = {name for name in changed if not name.startswith(layer_name.split("{")[0])}
    assert checked == set(changed) - outside and len(checked) >= 3 * 4
    is_tied, norm = teacher.config.tie_word_embeddings, last_norm(teacher)
    assert outside == {norm if is_tied else "lm_head.weight"}
    assert_same_tensors(dict(student.named_parameters()), dict(cut.named_parameters()) | changed)


@pytest.mark.parametrize(
    "kind", ["llama-untied-mha-biases", "gpt_neox-untied", "gemma3_text-untied"]
)
def test_the_output_matrix_comes_closest_to_the_teachers_logits(kind, tokens, tmp_path):
    teacher = random_teacher(kind)
    spec = random_spec(teacher, **CUT)
    cut, student, changed = refit(teacher, spec, tokens, tmp_path / "statistics")
    (x, _), (_, wanted) = (watched(model, tokens)["lm_head"] for model in (student, teacher))
    gram, before = x.T @ x / len(x), cut.lm_head.weight.double()
    ridge = PRIOR_TOKENS / len(x) * gram.diagonal().mean() * torch.eye(len(gram)).double()
    expected = (wanted.T @ x / len(x) + before @ ridge) @ torch.linalg.inv(gram + ridge)
    torch.testing.assert_close(changed["lm_head.weight"].double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [k for k in [*TEACHERS, *DESCENDANTS] if "-tied" in k])
@torch.no_grad()
def test_gains_before_a_tied_output_matrix_come_closest_to_the_teachers_logits(
    kind, tokens, tmp_path
):
    teacher = random_teacher(kind)
    spec = random_spec(teacher, layers=3, embed=32, kv_groups=1, mlp=40)
    cut, student, changed = refit(teacher, spec, tokens, tmp_path / "statistics")
    name, offset = last_norm(teacher), Architecture.of(teacher.config).family.norm_offset
    norm, streams = student.get_submodule(name.removesuffix(".weight")), []
    norm.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    student(tokens)
    stream = streams[0].flatten(0, 1).double()
    bias = torch.zeros(32).double()
    if hasattr(norm, "bias"):
        bias = norm.bias.double()
        stream -= stream.mean(dim=1, keepdim=True)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    x = stream / (stream.square().mean(dim=1, keepdim=True) + epsilon).sqrt()
    outputs = student.get_output_embeddings().weight.double()
    # One equation for each token and logit, all less their mean over the vocabulary.
    design = x[:, None, :] * outputs
    wanted = copy.deepcopy(teacher).double()(tokens).logits.flatten(0, 1) - bias @ outputs.T
    design = (design - design.mean(dim=1, keepdim=True)).flatten(0, 1)
    wanted = (wanted - wanted.mean(dim=1, keepdim=True)).flatten()
    gram = design.T @ design
    ridge = PRIOR_TOKENS / tokens.numel() * gram.diagonal().mean() * torch.eye(32).double()
    before = cut.get_parameter(name).double() + offset
    expected = torch.linalg.solve(gram + ridge, design.T @ wanted + ridge @ before) - offset
    torch.testing.assert_close(changed[name].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(student.get_parameter(name), changed[name])


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_students_end_nearer_to_the_teacher(kind, tokens, tmp_path):
    teacher = random_teacher(kind)
    spec = random_layerwise_spec(teacher, 0, layers=4, kv_groups=2, mlp=60)
    cut, student, _ = refit(teacher, spec, tokens, tmp_path / "statistics")
    wanted, before, after = (
        model(tokens, output_hidden_states=True).hidden_states[-1]
        for model in (teacher, cut, student)
    )
    assert (after - wanted).square().mean() < 0.9 * (before - wanted).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_before_the_first_cut_are_left_as_they_are(kind, tokens, tmp_path):
    teacher = random_teacher(kind)
    sizes = Architecture.of(teacher.config).sizes
    whole = SubnetSpec.identity(sizes)
    _, _, changed = refit(teacher, whole, tokens, tmp_path / "whole")
    assert not changed
    cut = SubnetSpec(whole.layers, whole.embed, whole.kv_groups, (*whole.mlp[:2], (0, 3, 5), (1,)))
    _, _, changed = refit(teacher, cut, tokens, tmp_path / "cut")
    layers = {name.split(".layers.")[1].split(".")[0] for name in changed if ".layers." in name}
    assert layers == {"2", "3"}
    _, _, changed = refit(teacher, random_spec(teacher, layers=3), tokens, tmp_path / "layers")
    assert changed


def test_queries_of_narrower_heads_stay_as_they_were_scaled(tokens, tmp_path):
    teacher = random_teacher("llama-tied-gqa")
    spec = random_spec(teacher, head_dim=8, mlp=40)
    _, _, changed = refit(teacher, spec, tokens, tmp_path / "statistics")
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == {"o_proj", "gate_proj", "up_proj", "down_proj", "norm"}


@pytest.mark.parametrize("kind", [k for k in DESCENDANTS if k.startswith(("gemma3", "olmo2"))])
def test_families_that_norm_what_they_write_are_refitted_at_the_output(kind, tokens, tmp_path):
    teacher = random_teacher(kind)
    assert not can_propagate(Architecture.of(teacher.config))
    spec = random_spec(teacher, mlp=40)
    _, _, changed = refit(teacher, spec, tokens, tmp_path / "statistics")
    is_tied = teacher.config.tie_word_embeddings
    assert set(changed) == {last_norm(teacher) if is_tied else "lm_head.weight"}
    whole = SubnetSpec.identity(Architecture.of(teacher.config).sizes)
    _, _, changed = refit(teacher, whole, tokens, tmp_path / "whole")
    assert not changed
