"""Selectors in a timm model: where they stand, what stays as it was, what is refused, and what the model then costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import timm.layers
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from svite_scale.config.schema import Config, SparsityConfig
from svite_scale.cost.flops import count_flops
from svite_scale.errors import ConfigError, OptionError
from svite_scale.models.dense import blocks, build_dense
from svite_scale.models.options import ModelConfig, TokensConfig
from svite_scale.models.sparse import build_sparse
from svite_scale.models.structure import pack_units
from svite_scale.models.token_insertion import insert_token_selectors, remove_token_selectors
from svite_scale.models.token_selector import PaperSelector, selector_loss, token_selectors
from svite_scale.options import options_of
from svite_scale.sparsity.layers.base import sparse_layers
from svite_scale.sparsity.packing import sparsify
from svite_scale.sparsity.parameter_groups import parameter_groups
from tests.cost.costs import count
from tests.sparsity.packing import packed_layers

SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 3, "patch_size": 8, "image_size": 40, "num_classes": 11, "in_channels": 1}
MODELS = {
    "class token": (ModelConfig(name="vit_tiny_patch16_224", **SMALL), 1),  # type: ignore[arg-type]
    "distilled": (ModelConfig(name="deit_tiny_distilled_patch16_224", **SMALL), 2),  # type: ignore[arg-type]
    "class token and registers": (ModelConfig(name="vit_small_patch14_reg4_dinov2", **SMALL), 5),  # type: ignore[arg-type]
    "register, average": (ModelConfig(name="vit_wee_patch16_reg1_gap_256", **SMALL), 1),  # type: ignore[arg-type]
    "attention pooling": (ModelConfig(name="vit_base_patch16_siglip_224", **SMALL), 0),  # type: ignore[arg-type]
}
MODEL = MODELS["class token"][0]
"""25 patch tokens and the class token."""


PARAMETERS = {"attention.queries", "classifier.projection", "classifier.weight", "classifier.bias"}
"""Of a selector of the signal classifier."""


def sparsity_of(*, keep: float | None = 0.5, blocks: tuple[int, ...] = (0,), **options: Any) -> SparsityConfig:
    return SparsityConfig(density=0.6, tokens=TokensConfig(keep=keep, blocks=blocks, **options))


def test_all_else_is_as_without_selectors() -> None:
    plain, plain_plan = build_sparse(MODEL, sparsity_of(keep=None), seed=3)
    model, plan = build_sparse(MODEL, sparsity_of(blocks=(0, 2)), seed=3)
    state = model.state_dict()
    added = set(state) - set(plain.state_dict())
    assert added == {f"blocks.selector{index}.{name}" for index in (0, 2) for name in PARAMETERS}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert plan == plain_plan
    assert [name for name, _ in model.blocks.named_children()] == ["selector0", "0", "1", "selector2", "2"]
    assert len(blocks(model)) == 3
    assert packed_layers(model).keys() == packed_layers(plain).keys()


def test_without_keep_there_are_none() -> None:
    assert not token_selectors(build_sparse(MODEL, sparsity_of(keep=None), seed=0)[0])


def test_the_dense_method_has_them_too() -> None:
    model, _ = build_sparse(MODEL, replace(sparsity_of(), method="dense"), seed=0)
    assert len(token_selectors(model)) == 1
    assert not packed_layers(model)


def test_a_model_with_selectors_can_be_made_sparse_and_they_stay_dense() -> None:
    model = build_dense(MODEL)
    (selector,) = insert_token_selectors(model, keep=0.5)
    plan = sparsify(model, 0.3)
    assert not [entry.name for entry in plan if "selector" in entry.name]
    shapes = {name: tuple(parameter.shape) for name, parameter in selector.named_parameters()}
    assert shapes == dict(zip(sorted(PARAMETERS), [(4, 24), (11,), (64, 24), (11, 64)], strict=True))


def test_heads_and_neurons_are_the_same_before_and_after() -> None:
    states = []
    for selectors_first in (False, True):
        torch.manual_seed(3)
        model = build_dense(MODEL)
        steps = [
            lambda model: pack_units(model, heads=0.7, neurons=0.5, seed=3),
            lambda model: insert_token_selectors(model, keep=0.5, blocks=(0, 2)),
        ]
        for step in reversed(steps) if selectors_first else steps:
            step(model)
        states.append(dict(model.state_dict()))
        assert len(sparse_layers(model)) == 6
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert "selector" in name or torch.equal(tensor, states[1][name]), name


def test_a_second_call_is_refused() -> None:
    model = build_dense(MODEL)
    insert_token_selectors(model, keep=0.5)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="the model has token selectors already; name the blocks of all of them in one call"):
        insert_token_selectors(model, keep=0.5, blocks=(1,))
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_blocks_get_the_kept_tokens_and_prefix_tokens_are_always_there(name: str, training: bool, checkpointing: bool) -> None:
    config, num_prefix = MODELS[name]
    sparsity = sparsity_of(blocks=(0, 2))
    model, _ = build_sparse(replace(config, activation_checkpointing=checkpointing), sparsity, seed=0)
    model.train(training)
    total = 25 + num_prefix
    first = int(total * 0.5 + 0.5)
    second = int(first * 0.5 + 0.5)
    seen: list[torch.Tensor] = []
    for item in (model.blocks.selector0, *blocks(model)):
        item.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    output = model(torch.randn(2, 1, 40, 40)).sum()
    (output + selector_loss(model, torch.tensor([3, 10])) if training else output).backward()
    assert {tuple(tokens.shape[::2]) for tokens in seen} == {(2, 24)}
    assert [tokens.shape[1] for tokens in seen[:4]] == [total, first, first, second]
    assert torch.equal(seen[1][:, :num_prefix], seen[0][:, :num_prefix])
    if training:
        assert all(p.grad is not None for selector in token_selectors(model) for p in selector.parameters())


@pytest.mark.parametrize("signal", ["classifier", "paper"])
def test_activation_checkpointing_changes_no_gradient(signal: str) -> None:
    gradients = []
    sparsity = sparsity_of(blocks=(0, 1), signal=signal)
    for checkpointing in (False, True):
        model, _ = build_sparse(replace(MODEL, activation_checkpointing=checkpointing), sparsity, seed=0)
        torch.manual_seed(1)
        loss = model.train()(torch.randn(4, 1, 40, 40)).square().sum()
        (loss + selector_loss(model, torch.arange(4))).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert torch.equal(gradients[1][name], gradient), name
    learnt = "blocks.selector0.weight" if signal == "paper" else "blocks.selector0.attention.queries"
    assert gradients[0][learnt].abs().max() > 0  # type: ignore[union-attr]


def test_a_generator_of_ones_own_is_refused_under_activation_checkpointing() -> None:
    paper: dict[str, Any] = {"keep": 0.5, "signal": "paper", "generator": torch.Generator()}
    (selector,) = insert_token_selectors(build_dense(MODEL), **paper)
    assert isinstance(selector, PaperSelector)
    assert selector.generator is paper["generator"]
    with pytest.raises(ValueError, match="repeats the noise of torch's global generator only; leave generator out"):
        insert_token_selectors(build_dense(replace(MODEL, activation_checkpointing=True)), **paper)


def test_a_generator_is_refused_where_nothing_is_drawn_from_it() -> None:
    with pytest.raises(ValueError, match="the signal classifier has no noise; leave generator out"):
        insert_token_selectors(build_dense(MODEL), keep=0.5, generator=torch.Generator())


def test_a_model_without_a_head_needs_the_number_of_classes() -> None:
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    with pytest.raises(OptionError, match=r"^num_classes = None: is missing, and the model has no head; give .* targets$"):
        insert_token_selectors(headless, keep=0.5)
    (selector,) = insert_token_selectors(headless, keep=0.5, num_classes=7)
    assert dict(selector.named_parameters())["classifier.weight"].shape == (7, 64)


def test_remove_token_selectors_gives_back_the_names_and_outputs_of_the_model() -> None:
    torch.manual_seed(0)
    model = build_dense(MODEL).eval()
    images = torch.randn(2, 1, 40, 40)
    names, output = list(model.state_dict()), model(images)
    insert_token_selectors(model, keep=0.5, blocks=(0, 2))
    assert not torch.equal(model.eval()(images), output)
    remove_token_selectors(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), output)


def test_weight_decay_applies_to_the_matrices_of_a_selector() -> None:
    model, _ = build_sparse(MODEL, sparsity_of(), seed=0)
    (selector,) = token_selectors(model)
    groups = parameter_groups(model, 0.05)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in selector.named_parameters()}
    assert found == dict.fromkeys(PARAMETERS, 0.05) | {"classifier.bias": 0.0}


REFUSED = [
    (sparsity_of(blocks=(0, 3)), "sparsity.tokens.blocks = [0, 3]: the model has 3 blocks; use 0 to 2"),
    (sparsity_of(keep=27.0), "sparsity.tokens.keep = 27.0: only 26 tokens reach the selector; lower it"),
    (
        sparsity_of(keep=0.05),
        "sparsity.tokens.keep = 0.05: keeps 1 of 26 tokens, and the 1 prefix tokens always stay, so no patch would; raise it",
    ),
    (
        sparsity_of(keep=0.2, blocks=(0, 2)),
        "sparsity.tokens.keep = 0.2: keeps 1 of 5 tokens, and the 1 prefix tokens always stay, so no patch would; raise it",
    ),
]


@pytest.mark.parametrize(("sparsity", "message"), REFUSED)
def test_what_does_not_fit_the_model_is_refused(sparsity: SparsityConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        count(Config(run_dir="unused", model=MODEL, sparsity=sparsity))
    assert str(caught.value) == message


@pytest.mark.parametrize(("sparsity", "message"), REFUSED)
def test_an_argument_that_does_not_fit_the_model_is_refused_by_its_own_name(sparsity: SparsityConfig, message: str) -> None:
    """In a loop of one's own there are no sections of a config."""
    model = build_dense(MODEL)
    with pytest.raises(OptionError) as caught:
        insert_token_selectors(model, **options_of(TokensConfig, sparsity.tokens))
    assert f"sparsity.tokens.{caught.value}" == message
    assert not token_selectors(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": None}, "keep = None: lets all tokens pass; say how many pass, 0.9 say"),
        ({"keep": 3.7}, "keep = 3.7: is no whole number of tokens; round it, or use a fraction of at most 1"),
        ({"keep": 0.0}, "keep = 0.0: is not above 0.0; use a number above 0.0 or null"),
        (
            {"keep": 0.5, "blocks": (1, 0)},
            "blocks = [1, 0]: doesn't name blocks in ascending order, each once; use for example [0]",
        ),
        ({"keep": 0.5, "mode": "masks"}, "mode = 'masks': is not one of gather, mask; use one of gather, mask"),
        ({"training_keep": 1.0}, "training_keep = 1.0: is not below 1.0; use a number above 0.0 and below 1.0 or null"),
        ({"keep": 0.5, "temperature": "hot"}, "temperature = 'hot': is not a number; use a number above 0.0"),
    ],
)
def test_an_argument_that_is_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        insert_token_selectors(build_dense(MODEL), **options)
    assert str(caught.value) == message


def test_a_count_may_be_an_int() -> None:
    (selector,) = insert_token_selectors(build_dense(MODEL), keep=9)
    assert selector.num_tokens == 9


def test_the_most_and_the_fewest_tokens_are_not_refused() -> None:
    for keep in (2.0, 26.0):
        (selector,) = token_selectors(build_sparse(MODEL, sparsity_of(keep=keep), seed=0)[0])
        assert selector.num_tokens == keep


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_is_what_torch_counts(name: str) -> None:
    """With all weights, so that tokens alone make the difference; torch counts a multiply and an add as two operations.

    The scores of the selectors, four queries of 24 features, are no matrix product, so torch doesn't count them.
    """
    sparsity = SparsityConfig(tokens=TokensConfig(keep=0.6, blocks=(1, 2)))
    model, _ = build_sparse(MODELS[name][0], sparsity, seed=0)
    timm.layers.set_fused_attn(False)
    try:
        counters = []
        for each in (model, build_sparse(MODELS[name][0], SparsityConfig(), seed=0)[0]):
            counter = FlopCounterMode(display=False)
            for block in blocks(each):
                block.attn.fused_attn = False  # type: ignore[union-attr, assignment]
            # torch's tracker of modules fails on a parameter that is a module's input, as attention pooling's query is.
            with counter, torch.no_grad():
                each.eval().requires_grad_(False)(torch.randn(1, 1, 40, 40))
            each.requires_grad_(True)
            counters.append(counter.get_total_flops())
    finally:
        timm.layers.set_fused_attn(True)
    cost = count_flops(model, MODELS[name][0].image_size)
    scores = 4 * 24 * (25 + token_selectors(model)[0].num_patches)
    assert [2 * (cost.sparse_macs - scores), 2 * cost.dense_macs] == pytest.approx(counters, rel=1e-3)
    selecting = sum(parameter.numel() for selector in token_selectors(model) for parameter in selector.parameters())
    assert cost.params_active == cost.params_dense + selecting == sum(parameter.numel() for parameter in model.parameters())


def test_masked_tokens_save_nothing_and_scores_cost_something() -> None:
    cost = count(Config(run_dir="unused", model=MODEL, sparsity=SparsityConfig(tokens=TokensConfig(keep=0.5, mode="mask"))))
    assert cost.sparse_macs == cost.dense_macs + 4 * 24 * 25


def test_a_forward_in_training_costs_what_is_dropped_less_and_the_classifier_more() -> None:
    """11 classes, 4 queries, 16 numbers of each, 24 features; 25 patches, of which 10 stay."""
    plain = count_flops(build_dense(MODEL), 40)
    model = build_dense(MODEL)
    insert_token_selectors(model, training_keep=0.4, blocks=(1,))
    assert count_flops(model, 40).sparse_macs == plain.sparse_macs
    training = count_flops(model, 40, training=True)
    kept = build_dense(MODEL)
    insert_token_selectors(kept, keep=11, blocks=(1,))
    assert count_flops(kept, 40).sparse_macs < 0.7 * plain.sparse_macs
    classifier = 4 * 24 * 25 + 4 * 16 * 24 + 11 * 4 * 16
    assert training.sparse_macs == count_flops(kept, 40).sparse_macs + classifier
    assert count_flops(kept, 40, training=True).sparse_macs == training.sparse_macs


def test_deit_small_saves_what_the_abstract_says() -> None:
    """Half of the weights and 5% of the tokens; the paper counts a little differently."""
    sparsity = SparsityConfig(density=0.5, tokens=TokensConfig(keep=0.95))
    cost = count(Config(run_dir="unused", model=ModelConfig(name="deit_small_patch16_224"), sparsity=sparsity))
    assert 100 * cost.saving == pytest.approx(49.32, abs=0.1)


def test_a_selector_is_called_by_a_plain_loop_over_the_blocks() -> None:
    model, _ = build_sparse(MODEL, sparsity_of(), seed=0)
    x = torch.randn(2, 26, 24)
    for item in model.eval().blocks:
        x = item(x)
    assert x.shape == (2, 13, 24)
    assert isinstance(model.blocks, nn.Sequential)
