"""Packed heads and neurons: the function, the scores and the initial rows of a dense float64 twin."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerScale
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale import attach
from svite_scale.models.dense import build_dense
from svite_scale.models.options import ModelConfig
from svite_scale.sparsity.layers.base import LayerContext, SparseLayer, sparse_layers
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.topology.engine import TopologyEngine
from tests import reference
from tests.models.unit_scores import HeadOutputs, naive_scores
from tests.models.unit_twins import (
    SEED,
    TINY,
    Build,
    active_units,
    batch,
    block_of,
    build_model,
    dense_of,
    dense_twin,
    loss_of,
    packed_vit,
    set_heads,
    set_neurons,
)

METHOD_SEED = 11
FRACTION = 0.4
VARIANTS: dict[str, Build] = {
    "plain": build_model,
    "distilled": lambda: build_dense(ModelConfig(name="deit_tiny_distilled_patch16_224", **TINY)),
    "registers, LayerScale": lambda: build_dense(ModelConfig(name="vit_small_patch14_reg4_dinov2", **TINY)),
    # No model of timm's list has it with plain blocks. Two numbers, a head's width here, would leave only signs after a norm.
    "qk-norm": lambda: VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, embed_dim=24, depth=2, num_heads=6, num_classes=5, qk_norm=True
    ),
}


def test_the_variants_are_what_they_are_called() -> None:
    models = {name: build() for name, build in VARIANTS.items()}
    assert {name: model.num_prefix_tokens for name, model in models.items()} == {
        "plain": 1,
        "distilled": 2,
        "registers, LayerScale": 5,
        "qk-norm": 1,
    }
    blocks = {name: model.blocks[0] for name, model in models.items()}
    assert [name for name, block in blocks.items() if isinstance(block.ls1, LayerScale)] == ["registers, LayerScale"]
    assert [name for name, block in blocks.items() if isinstance(block.attn.q_norm, nn.LayerNorm)] == ["qk-norm"]


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-10, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grow", ["candidate", "paper"])
def test_the_function_is_that_of_the_dense_model_without_the_absent_units(variant: str, grow: str) -> None:
    packed = packed_vit(VARIANTS[variant], grow=grow).eval()
    twin = dense_twin(packed, VARIANTS[variant]).eval()
    images, _ = batch()
    with torch.no_grad():
        close(packed(images), twin(images))
    assert len(sparse_layers(packed)) == 2 * len(packed.blocks)


@pytest.mark.parametrize("grow", ["candidate", "paper"])
def test_masks_of_attention_hide_what_they_hide_in_the_dense_model(grow: str) -> None:
    packed = packed_vit(grow=grow)
    twin = dense_twin(packed)
    tokens = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) + torch.eye(7) > 0.5
    with torch.no_grad():
        for ours, theirs in zip(packed.blocks, twin.blocks, strict=True):
            whole = ours.attn(tokens)
            for arguments in ({"attn_mask": mask}, {"attn_mask": mask * -1.5}, {"is_causal": True}):
                masked = ours.attn(tokens, **arguments)
                close(masked, theirs.attn(tokens, **arguments), str(arguments))
                assert not torch.allclose(masked, whole, rtol=1e-3)


def engine_of(
    model: nn.Module, options: TopologyOptions | None = None, **schedule: float
) -> tuple[TopologyEngine, torch.optim.Optimizer]:
    """An engine that moves 40% at every step, but at most one head, or as ``schedule`` says, and the optimizer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    keywords = {"total_steps": 10, "update_every": 1, "unit_drop_fraction": FRACTION, "drop_schedule": "constant", **schedule}
    return attach(model, optimizer, **keywords, options=options), optimizer  # type: ignore[arg-type]


def context_of(topology: TopologyEngine, layer: SparseLayer) -> LayerContext:
    return LayerContext(layer, layer.mask, topology.access, topology.growth)


@pytest.mark.parametrize("masked", [False, True])
def test_scores_and_the_topology_are_those_of_the_dense_twin(masked: bool) -> None:
    mask = torch.rand(10, 10, generator=torch.Generator().manual_seed(1)) + torch.eye(10) > 0.4 if masked else None
    packed = packed_vit()
    topology, _ = engine_of(packed)
    twin = dense_twin(packed, step=1)
    outputs = HeadOutputs(twin)
    loss_of(packed, attn_mask=mask).backward()
    loss_of(twin, attn_mask=mask).backward()
    naive = {name: naive_scores(twin, outputs, layer, "candidate") for name, layer in topology.layers.items()}
    before = {name: active_units(layer) for name, layer in topology.layers.items()}
    for name, layer in topology.layers.items():
        drop, growth = naive[name]
        close(context_of(topology, layer).growth_scores().double(), growth, name)
        found = context_of(topology, layer).importance()
        close(found.double()[before[name]], drop[before[name]], name)
        assert (growth > 0).all(), "absent units can be told apart"
    assert topology.step() is not None
    moved = 0
    for name, layer in topology.layers.items():
        count = reference.num_units_moved(FRACTION, layer.num_active, name, step=1, seed=topology.options.seed)
        expected = reference.prune_and_grow(before[name].tolist(), naive[name][0].tolist(), naive[name][1].tolist(), count)
        assert active_units(layer).tolist() == expected, name
        moved += int((active_units(layer) & ~before[name]).sum())
    assert moved > 5


@pytest.mark.parametrize("protect_grown", [False, True])
def test_several_updates_are_those_of_the_dense_twin(protect_grown: bool) -> None:
    """The optimizer steps before each update, and not with it, so that the twin has the weights of both."""
    packed = packed_vit()
    options = TopologyOptions(protect_grown=protect_grown, seed=METHOD_SEED)
    topology, optimizer = engine_of(packed, options, update_every=2, total_steps=16, stop_fraction=1.0)
    recently_grown: dict[str, set[int]] = {name: set() for name in topology.layers}
    survived = lost = 0
    for step in range(1, 17):
        optimizer.zero_grad()
        loss_of(packed, step).backward()
        if step % 2:
            optimizer.step()
            topology.step()
            continue
        twin = dense_twin(packed, step=step, trained=True)
        outputs = HeadOutputs(twin)
        loss_of(twin, step).backward()
        before = {name: active_units(layer).tolist() for name, layer in topology.layers.items()}
        scores = {name: naive_scores(twin, outputs, layer, "candidate") for name, layer in topology.layers.items()}
        topology.step()
        for name, layer in topology.layers.items():
            drop, growth = scores[name]
            count = reference.num_units_moved(FRACTION, layer.num_active, name, step, METHOD_SEED)
            protected = recently_grown[name] if protect_grown else set()
            expected = reference.prune_and_grow(before[name], drop.tolist(), growth.tolist(), count, protected)
            after = active_units(layer).tolist()
            assert after == expected, f"{name} after step {step}"
            survived += sum(after[unit] for unit in recently_grown[name])
            lost += sum(not after[unit] for unit in recently_grown[name])
            recently_grown[name] = {unit for unit, active in enumerate(after) if active and not before[name][unit]}
    assert survived + lost > 20
    assert (lost == 0) == protect_grown


def test_how_large_a_heads_output_is_has_no_part_in_its_growth_score() -> None:
    """Else what was trained, and just dropped, would come back before any fresh candidate."""
    scores = []
    for scale in (1.0, 8.0):
        packed = packed_vit()
        with torch.no_grad():
            for block in packed.blocks:
                # The function stays: values of the active heads grow, their columns shrink.
                block.attn.qkv.weight.view(3, -1, 12)[2] *= scale
                block.attn.proj.weight /= scale
        topology, _ = engine_of(packed)
        loss_of(packed).backward()
        layers = {name: layer for name, layer in topology.layers.items() if layer.unit == "heads"}
        found = {name: context_of(topology, layer).growth_scores() for name, layer in layers.items()}
        scores.append({name: score / score.norm() for name, score in found.items()})
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-5, atol=0.0)


def test_units_grow_at_random_where_the_method_says_so() -> None:
    packed = packed_vit()
    topology, _ = engine_of(packed, TopologyOptions(method="set", seed=METHOD_SEED))
    loss_of(packed).backward()
    drops = {name: context_of(topology, layer).importance() for name, layer in topology.layers.items()}
    before = {name: active_units(layer) for name, layer in topology.layers.items()}
    topology.step()
    for name, layer in topology.layers.items():
        chance = reference.hashed_uniform(METHOD_SEED, 1, name, range(layer.shape.numel()))
        count = reference.num_units_moved(FRACTION, layer.num_active, name, step=1, seed=topology.options.seed)
        expected = reference.prune_and_grow(before[name].tolist(), drops[name].tolist(), chance, count)
        assert active_units(layer).tolist() == expected, name


def test_a_static_topology_stays() -> None:
    packed = packed_vit()
    topology, _ = engine_of(packed, TopologyOptions(method="static"))
    loss_of(packed).backward()
    assert topology.step() is None


def test_the_papers_scores_are_those_of_its_code() -> None:
    """A neuron's own gradient, so that just what was dropped comes back; a head's mean |dL/dA| under dense projections."""
    packed = packed_vit(grow="paper")
    topology, _ = engine_of(packed)
    torch.manual_seed(SEED)
    twin = build_model().double()
    for layer in topology.layers.values():
        block, absent = block_of(twin, layer), ~active_units(layer)
        if layer.unit == "neurons":
            set_neurons(block.mlp, absent, 0.0)
        else:
            columns = block.attn.proj.weight.detach().clone()
            set_heads(block.attn, absent, 0.0)
            block.attn.proj.weight.data.copy_(columns)
    outputs = HeadOutputs(twin)
    loss_of(packed).backward()
    loss_of(twin).backward()
    before = {name: active_units(layer) for name, layer in topology.layers.items()}
    scores = {name: naive_scores(twin, outputs, layer, "paper") for name, layer in topology.layers.items()}
    topology.step()
    for name, layer in topology.layers.items():
        drop, growth = scores[name]
        count = reference.num_units_moved(FRACTION, layer.num_active, name, step=1, seed=topology.options.seed)
        expected = reference.prune_and_grow(before[name].tolist(), drop.tolist(), growth.tolist(), count)
        assert active_units(layer).tolist() == expected, name
        if layer.unit == "neurons":
            assert torch.equal(active_units(layer), before[name])


def test_grown_units_start_at_0_when_grow_is_paper() -> None:
    """By chance, since the paper's score lets no other neuron come than was dropped."""
    packed = packed_vit(grow="paper")
    topology, optimizer = engine_of(packed, TopologyOptions(method="set", seed=METHOD_SEED))
    before = {name: active_units(layer) for name, layer in topology.layers.items()}
    loss_of(packed).backward()
    optimizer.step()
    topology.step()
    born = dict.fromkeys(("heads", "neurons"), 0)
    for name, layer in topology.layers.items():
        grown = (active_units(layer) & ~before[name])[active_units(layer)]
        born[layer.unit] += int(grown.sum())
        for key, each in layer.unit_parameters().items():
            rows = each.parameter.detach().view(each.repeats, layer.num_active, -1)
            assert not rows[:, grown].any(), f"{key} of {name}"
            assert rows[:, ~grown].any(), f"{key} of {name}"
    assert all(born.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_grown_unit_leaves_the_function_and_learns_within_two_steps(variant: str) -> None:
    packed = packed_vit(VARIANTS[variant])
    topology, optimizer = engine_of(packed, update_every=3, total_steps=4, stop_fraction=1.0)
    before = {name: active_units(layer) for name, layer in topology.layers.items()}
    for step in range(3):
        optimizer.zero_grad()
        loss_of(packed, step).backward()
        optimizer.step()
        twin = dense_of(packed, VARIANTS[variant]) if step == 2 else None
        topology.step()
    after = {name: active_units(layer) for name, layer in topology.layers.items()}
    assert twin is not None
    assert {layer.unit for name, layer in topology.layers.items() if (after[name] & ~before[name]).any()} == {
        "heads",
        "neurons",
    }
    for name, layer in topology.layers.items():
        block, gone = block_of(twin, layer), before[name] & ~after[name]
        if layer.unit == "neurons":
            set_neurons(block.mlp, gone, 0.0)
        else:
            set_heads(block.attn, gone, 0.0)
    images, _ = batch()
    packed.eval(), twin.eval()
    with torch.no_grad():
        close(packed(images), twin(images), "the function changed with what has grown")
    packed.train()
    learned: dict[tuple[str, str], Tensor] = {}
    for step in range(2):
        optimizer.zero_grad()
        loss_of(packed, step).backward()
        for name, layer in topology.layers.items():
            for key, each in layer.unit_parameters().items():
                assert each.parameter.grad is not None
                gradient = each.parameter.grad.abs()
                learned[name, key] = learned.get((name, key), torch.zeros_like(gradient)) + gradient
        optimizer.step()
    for name, layer in topology.layers.items():
        born = (after[name] & ~before[name])[after[name]]
        for key, each in layer.unit_parameters().items():
            if key.endswith("weight"):
                rows = learned[name, key].view(each.repeats, layer.num_active, -1)[:, born]
                assert (rows > 0).all(), f"{name}.{key}: {int((rows == 0).sum())} grown weights have had no gradient"


def test_values_and_moments_follow_the_units() -> None:
    packed = packed_vit()
    topology, optimizer = engine_of(packed, update_every=2)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(packed, step).backward()
        optimizer.step()
        if step == 0:
            topology.step()
    before = {name: (active_units(layer), rows_of(layer, optimizer)) for name, layer in topology.layers.items()}
    topology.step()
    for name, layer in topology.layers.items():
        old, rows = before[name]
        new, now = active_units(layer), rows_of(layer, optimizer)
        stays, grown = old & new, new & ~old
        for key, old_rows in rows.items():
            assert torch.equal(now[key][:, stays[new]], old_rows[:, stays[old]]), f"{key} of {name}"
            born = now[key][:, grown[new]]
            if key.endswith("exp_avg_sq"):
                close(born, torch.full_like(born, float(old_rows.mean())))
            elif not key.endswith(("fc1.weight", "qkv.weight")):
                assert not born.any(), f"{key} of {name}"


def rows_of(layer: SparseLayer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Values and moments by name, ``[repeats, active units, elements]``."""
    rows: dict[str, Tensor] = {}
    for key, each in layer.unit_parameters().items():
        state = optimizer.state[each.parameter]
        for name, tensor in {
            "": each.parameter.detach(),
            ".exp_avg": state["exp_avg"],
            ".exp_avg_sq": state["exp_avg_sq"],
        }.items():
            rows[key + name] = tensor.clone().view(each.repeats, layer.num_active, -1)
    return rows
