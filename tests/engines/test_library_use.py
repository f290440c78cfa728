"""Three lines in a training loop of the user's own, whatever engine they use."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import svite_scale
from svite_scale.errors import TopologyError
from svite_scale.models.token_selector import PaperSelector
from svite_scale.sparsity import bits
from svite_scale.sparsity.layers.packed import PackedLayer
from svite_scale.sparsity.topology.engine import TopologyEngine
from tests.ranks import run_on_ranks

STEPS, UPDATES = 24, [6, 12, 18]
DENSITY = 0.37


@dataclass
class Outcome:
    """What the loop saw.

    Attributes:
        losses: mean over ranks, by step.
        updates: optimizer steps after which the topology moved.
        masks: by layer name, as bools, at the start and at the end.
        ever_active: share of the weights that has been active, at the last update.
    """

    losses: list[float]
    updates: list[int]
    masks: tuple[dict[str, list[bool]], dict[str, list[bool]]]
    ever_active: float


def users_model() -> nn.Module:
    """Neither a ViT nor from timm; the counts divide by nothing."""
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 5, 3, padding=1)
    return nn.Sequential(
        convolution, nn.ReLU(), nn.Flatten(), nn.Linear(180, 31), nn.LayerNorm(31), nn.ReLU(), nn.Linear(31, 3)
    )


def batches() -> Iterable[tuple[Tensor, Tensor]]:
    """This rank's share: which third of the image is brightest, by far, so that 24 steps learn it from any masks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        images = torch.rand(24, 1, 6, 6, generator=generator)
        labels = images.view(24, 3, 12).mean(dim=2).argmax(dim=1)
        images.view(24, 3, 12)[torch.arange(24), labels] += 1.0
        yield images[rank::size], labels[rank::size]


def masks_of(topology: TopologyEngine) -> dict[str, list[bool]]:
    layers = topology.layers.items()
    return {name: bits.unpack(topology.access.read(layer.mask), layer.shape.numel()).tolist() for name, layer in layers}


def loop(forward: Callable[[Tensor], Tensor], step: Callable[[Tensor], None], topology: TopologyEngine) -> Outcome:
    """The user's own; what is ours is ``topology.step()``."""
    start, losses, updates, ever_active = masks_of(topology), [], [], 0.0
    for images, labels in batches():
        loss = nn.functional.cross_entropy(forward(images), labels)
        step(loss)
        update = topology.step()
        if update:
            updates.append(update.step)
            ever_active = update.ever_active()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return Outcome(losses, updates, (start, masks_of(topology)), ever_active)


def attached(model: Any, optimizer: torch.optim.Optimizer | None = None) -> TopologyEngine:
    # The warm-up hooks the optimizer, whatever wraps it.
    options = svite_scale.TopologyOptions(grown_warmup_steps=3)
    return svite_scale.attach(model, optimizer, total_steps=STEPS, update_every=6, options=options)


def torch_step(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain() -> Outcome:
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    return loop(model, torch_step(optimizer), attached(model, optimizer))


def ddp() -> Outcome:
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trainable(wrapped), lr=3e-3)
    return loop(wrapped, torch_step(optimizer), attached(wrapped, optimizer))


def fsdp2() -> Outcome:
    from torch.distributed.fsdp import fully_shard

    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    for module in (model[3], model):
        fully_shard(module)
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    return loop(model, torch_step(optimizer), attached(model, optimizer))


def deepspeed_engine(model: nn.Module, stage: int) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 12,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }
    optimizer = torch.optim.AdamW(trainable(model), lr=3e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def deepspeed(stage: int) -> Outcome:
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    engine = deepspeed_engine(model, stage)

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return loop(engine, step, attached(engine))


def accelerate() -> Outcome:
    from accelerate import Accelerator

    return accelerated(Accelerator(cpu=True), is_fsdp2=False)


def accelerate_fsdp2() -> Outcome:
    """Through Accelerate's plugin, which it takes on GPUs only: so its state is told that it took it here."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    accelerator = Accelerator(cpu=True)
    units = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["PackedLinear"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **units)
    # There is no public way; accelerated() sees whether this one is one.
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    try:
        return accelerated(accelerator, is_fsdp2=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(accelerator: Any, *, is_fsdp2: bool) -> Outcome:
    from torch.distributed.fsdp import FSDPModule

    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable(model), lr=3e-3))
    assert accelerator.num_processes == dist.get_world_size()
    assert isinstance(model, FSDPModule) == accelerator.is_fsdp2 == is_fsdp2

    def step(loss: Tensor) -> None:
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return loop(model, step, attached(model, optimizer))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def assert_weights_moved(outcome: Outcome) -> None:
    start, end = outcome.masks
    assert outcome.updates == UPDATES
    assert [len(mask) for mask in start.values()] == [45, 5580, 93]
    for name, mask in start.items():
        assert sum(end[name]) == sum(mask), "density is the same"
        assert end[name] != mask, "weights moved"
    numel = sum(map(len, start.values()))
    assert abs(sum(map(sum, start.values())) - DENSITY * numel) <= 1
    assert DENSITY < outcome.ever_active < 1
    assert sum(outcome.losses[-6:]) < 0.95 * sum(outcome.losses[:6]), "it learns"


def test_a_plain_loop_without_torch_distributed() -> None:
    assert_weights_moved(plain())


@pytest.mark.parametrize("use", [ddp, fsdp2, accelerate, accelerate_fsdp2, deepspeed], ids=lambda use: use.__name__)
def test_an_engine_of_the_users_own_trains_as_one_process_does(use: Callable[..., Outcome]) -> None:
    single = plain()
    for stages in [(2,), (3,)] if use is deepspeed else [()]:
        for outcome in run_on_ranks(2, use, *stages):
            assert_weights_moved(outcome)
            assert outcome.masks == single.masks
            assert outcome.losses == pytest.approx(single.losses, abs=1e-4)


def refusal(model: Any, optimizer: torch.optim.Optimizer | None = None) -> str:
    with pytest.raises(TopologyError) as error:
        attached(model, optimizer)
    return str(error.value)


def refused_engines() -> tuple[str, str, str]:
    """An engine that runs no ZeRO, an optimizer from before FSDP2 replaced the parameters, and FSDP2 over two mesh axes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    no_zero = refusal(deepspeed_engine(model, 0))
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    optimizer = torch.optim.AdamW(trainable(model))
    fully_shard(model)
    before_sharding = refusal(model, optimizer)
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    return no_zero, before_sharding, refusal(model, torch.optim.AdamW(trainable(model)))


def too_late() -> list[str]:
    """The errors of what comes before an engine, where DDP or FSDP2 has wrapped the model."""
    from torch.distributed.fsdp import fully_shard

    errors = []
    for wrap in (DistributedDataParallel, fully_shard):
        model = wrap(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2))
        for make_sparse, options in (
            (svite_scale.sparsify, {"density": 0.5}),
            (svite_scale.pack_units, {"heads": 0.5}),
            (svite_scale.insert_token_selectors, {"keep": 0.5}),
        ):
            with pytest.raises(TopologyError) as error:
                make_sparse(model, **options)
            errors.append(str(error.value))
    return errors


def test_a_model_is_made_sparse_before_an_engine_wraps_it() -> None:
    for errors in run_on_ranks(2, too_late):
        ddp, fsdp2 = set(errors[:3]), set(errors[3:])
        assert len(ddp) == len(fsdp2) == 1
        assert ddp.pop().startswith("a DistributedDataParallel has wrapped the model already; make the model sparse first")
        assert "is sharded already" in fsdp2.pop()


def test_what_cant_be_attached_is_refused_with_a_remedy() -> None:
    model = users_model()
    dense_optimizer = torch.optim.AdamW(model.parameters())
    assert refusal(model, dense_optimizer).startswith("the model has no sparse layers; call svite_scale.sparsify(")
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    assert refusal(model) == "Sequential needs its optimizer too: attach(model, optimizer, ...)"
    too_early = "the optimizer doesn't step 0.values; build it after sparsify() and after the engine wrapped the model"
    assert refusal(model, dense_optimizer) == too_early
    options = svite_scale.TopologyOptions(method="dense")
    with pytest.raises(
        TopologyError, match=r"method dense has no sparse layers, .*; leave sparsify\(\) out, or use method static"
    ):
        svite_scale.attach(model, dense_optimizer, total_steps=STEPS, update_every=6, options=options)
    for no_zero, before_sharding, two_axes in run_on_ranks(2, refused_engines):
        assert no_zero == "the DeepSpeed engine runs ZeRO stage 0; use stage 1, 2 or 3"
        assert before_sharding == too_early
        assert re.fullmatch(
            r"0\.values is placed as \(Replicate\(\), Shard\(dim=0\)\); shard it over one mesh axis, .*", two_axes
        )


def test_an_optimizer_whose_state_cant_follow_weights_is_refused_at_the_update() -> None:
    model = users_model()
    svite_scale.sparsify(model, DENSITY, distribution="uniform")
    optimizer = torch.optim.AdamW(trainable(model))
    topology = svite_scale.attach(model, optimizer, total_steps=10, update_every=1)
    images, labels = next(iter(batches()))
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    layer = next(module for module in model.modules() if isinstance(module, PackedLayer))
    optimizer.state[layer.values]["row_sums"] = torch.zeros(2)
    with pytest.raises(TopologyError, match=r"optimizer state 'row_sums' of shape \(2,\) .* use an optimizer with one entry"):
        topology.step()


class Selecting(nn.Sequential):
    """A model of 3 patches with a token selector, in a loop of the user's own."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Unflatten(1, (3, 12)), PaperSelector(12, 2, 0), nn.Flatten(), nn.Linear(24, 3))


def temperatures(topology: TopologyEngine, selector: PaperSelector, steps: int) -> list[float]:
    """The temperature of each forward."""
    found = []
    for _ in range(steps):
        found.append(selector.temperature)
        topology.step()
    return found


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_step_anneals_token_selectors_with_sparse_layers_or_without(density: float) -> None:
    model, when = Selecting(), {"total_steps": 10}
    if density < 1.0:
        svite_scale.sparsify(model, density)
        when["update_every"] = 100
    topology = svite_scale.attach(model, torch.optim.SGD(trainable(model), lr=0.1), **when)
    expected = [10 - 0.99 * step for step in range(10)]
    assert temperatures(topology, model[1], 10) == pytest.approx(expected)  # type: ignore[arg-type]
    assert temperatures(topology, model[1], 2) == pytest.approx([0.1, 0.1]), "training may go on"  # type: ignore[arg-type]


def test_a_loaded_topology_sets_the_temperature_of_its_step() -> None:
    topologies = []
    for _ in range(2):
        model = Selecting()
        topologies.append((svite_scale.attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=10), model[1]))
    (saved, _), (resumed, selector) = topologies
    for _ in range(4):
        saved.step()
    resumed.load_state_dict(saved.state_dict())
    assert resumed.steps == 4
    assert selector.temperature == pytest.approx(10 - 0.99 * 4)
