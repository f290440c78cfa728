"""What a run would do, without doing it: the plan that ``--dry-run`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.models import VisionTransformer
from torch import nn

from svite_scale.config.schema import Config
from svite_scale.cost.flops import ModelCost, count_flops
from svite_scale.cost.memory import ModelSize, bytes_per_rank, model_sizes
from svite_scale.models.sparse import SparseModel
from svite_scale.models.teacher import build_teacher
from svite_scale.models.token_selector import token_selectors
from svite_scale.sparsity.allocation.layer_plan import LayerPlan, plan_density
from svite_scale.sparsity.block_grid import SINGLE


def describe(config: Config, world_size: int, sparse: SparseModel) -> str:
    """Returns the plan of a run as text: layers, parameters, multiply-accumulates, and bytes of training state per rank.

    Args:
        config: of the run.
        world_size: ranks that share the training state.
        sparse: its model on the meta device, from :func:`~svite_scale.config.validate.validate`.

    Raises:
        ConfigError: the teacher can't be built, or its file can't be used.
    """
    # On both, since a run is often looked at on another machine than it will train on.
    size = config.model.image_size
    costs = [count_flops(sparse.model, size, device=device) for device in ("cpu", "cuda")]
    # Only token selectors make a forward in training another one.
    training = count_flops(sparse.model, size, device="cpu", training=True) if token_selectors(sparse.model) else costs[0]
    sections = (
        _layers(sparse.layers, config.sparsity.block),
        "\n".join([*_costs(config, costs, training), *_tokens(sparse.model), *_teacher(config)]),
        _bytes(config, world_size, *model_sizes(sparse.model, costs[0])),
    )
    return "\n\n".join(sections)


def _layers(plan: list[LayerPlan], block: tuple[int, int]) -> str:
    width = max(len(layer.name) for layer in plan)
    lines = [f"{'layer':{width}}  {'shape':>18}  {'density':>8}  {'active':>11}  {'of':>11}"]
    for layer in plan:
        shape = "x".join(str(size) for size in layer.shape)
        row = f"{layer.name:{width}}  {shape:>18}  {layer.density:8.4f}  {layer.num_active:11,}  {layer.numel:11,}"
        lines.append("  ".join([row, *_remarks(layer, block)]))
    sparse = [layer for layer in plan if not layer.kept_dense]
    active, total = sum(layer.num_active for layer in sparse), sum(layer.numel for layer in sparse)
    lines.append(f"{'all prunable':{width}}  {'':>18}  {plan_density(plan):8.4f}  {active:11,}  {total:11,}")
    return "\n".join(lines)


def _remarks(layer: LayerPlan, block: tuple[int, int]) -> list[str]:
    """Returns what is special about a layer, in a plan for blocks of this size."""
    in_blocks = layer.block != SINGLE
    remarks = {
        f"blocks of {block[0]} x {block[1]}": layer.is_packed and in_blocks,
        f"single weights: {block[0]} x {block[1]} doesn't divide it": layer.is_packed and layer.block != block,
        f"raised to one {'block' if in_blocks else 'weight'}": layer.raised,
        "kept dense": layer.kept_dense,
        "by heads": layer.in_units and ".attn." in layer.name,
        "by neurons": layer.in_units and ".mlp." in layer.name,
        "stays dense": not (layer.is_packed or layer.kept_dense or layer.in_units),
    }
    return [remark for remark, holds in remarks.items() if holds]


def _costs(config: Config, costs: Sequence[ModelCost], training: ModelCost) -> list[str]:
    """Returns the lines on the cost; ``costs`` differ in the device, and ``training`` is that of a forward in training."""
    cost = costs[0]

    def macs(count: int) -> str:
        fewer = 100 * (1 - count / cost.dense_macs)
        return f"{count / 1e9:.4f} of {cost.dense_macs / 1e9:.4f} GMACs: {fewer:.2f}% fewer"

    return [
        f"model               {config.model.name}, {config.model.image_size} px",
        f"weights             {config.model.weights or 'drawn'}",
        f"parameters          {cost.params_active:,} active of {cost.params_dense:,}",
        f"forward, one image  {macs(cost.sparse_macs)}",
        *([f"  in training       {macs(training.sparse_macs)}"] if training != cost else []),
        *(f"{f'multiplied on {each.device_type}':18}  {macs(each.multiplied_macs)}" for each in costs),
        f"optimizer step      {config.train.global_batch_size:,} samples",
    ]


def _tokens(model: nn.Module) -> list[str]:
    """A line on the tokens of an image, where selectors let not all of them pass."""
    selectors = token_selectors(model)
    if not selectors:
        return []
    vit = cast(VisionTransformer, model)
    passing = "".join(f", then {selector.num_tokens:,}" for selector in selectors)
    until = selectors[0].patches.until
    when = "" if until is None else f", until {100 * until:g}% of training; evaluation and exports have all"
    return [f"tokens              {vit.patch_embed.num_patches + vit.num_prefix_tokens:,}{passing}{when}"]


def _teacher(config: Config) -> list[str]:
    """A line on the teacher, which isn't in the training state; empty where there is none."""
    if config.distillation.teacher is None:
        return []
    tensors = build_teacher(config.distillation, config.model).state_dict().values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return [f"teacher             {config.distillation.teacher}, whole on each rank: {size:,} bytes more"]


def _bytes(config: Config, world_size: int, sparse: ModelSize, dense: ModelSize) -> str:
    engine, ema = config.parallel.engine, config.train.ema_decay is not None
    packed, twin = (
        bytes_per_rank(config.parallel, config.train.precision, world_size, size, ema=ema) for size in (sparse, dense)
    )
    lines = [f"training state per rank, {engine}, {config.train.precision}, {world_size} rank(s): bytes, dense twin, ratio"]
    for kind in packed:
        ratio = f"{packed[kind] / twin[kind]:6.3f}" if twin[kind] else "     -"
        lines.append(f"  {kind:15}  {packed[kind]:15,}  {twin[kind]:15,}  {ratio}")
    total, total_dense = sum(packed.values()), sum(twin.values())
    lines.append(f"  {'all':15}  {total:15,}  {total_dense:15,}  {total / total_dense:6.3f}")
    return "\n".join(lines)
