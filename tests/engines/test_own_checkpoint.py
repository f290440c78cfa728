"""A loop of the user's own saves itself with ``torch.distributed.checkpoint``, and resumes exactly on other ranks and engines.

Everything here is torch's or public in svite_scale, as in docs/library.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import svite_scale
from tests.ranks import run_on_ranks

STOP, END = 11, 20
"""Updates come after steps 6, 12 and 18. Steps 10 to 12 are a growth window, so two thirds of it are saved."""
OPTIONS = svite_scale.TopologyOptions(grow_window=3, grown_warmup_steps=6)
SIZES = {"img_size": 14, "patch_size": 7, "in_chans": 1, "embed_dim": 20, "depth": 2, "num_heads": 4, "num_classes": 10}


class Loop:
    """A training loop over a small ViT. All methods are collectives."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **SIZES)
        svite_scale.pack_units(model, neurons=0.5, seed=seed)
        svite_scale.sparsify(model, density=0.37, block=(4, 1), seed=seed)  # which don't divide the head: it has single weights
        if kind == "fsdp2":
            for module in (*model.blocks, model):
                fully_shard(module)
        self.model = DistributedDataParallel(model) if kind == "ddp" else model
        groups = svite_scale.parameter_groups(self.model, weight_decay=0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        schedule = {"total_steps": 40, "update_every": 6, "unit_drop_fraction": 0.5}
        self.topology = svite_scale.attach(self.model, self.optimizer, options=OPTIONS, **schedule)
        self.ema = svite_scale.Ema(self.model, self.topology, decay=0.9)

    def train(self, last: int) -> list[float]:
        """Trains up to a step on each rank's part of 24 samples a step; returns the losses over all ranks."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        losses = []
        for step in range(self.topology.steps, last):
            images = torch.randn(24, 1, 14, 14, generator=torch.Generator().manual_seed(step))[rank::world_size]
            labels = (torch.arange(24) % 10)[rank::world_size]
            loss = nn.functional.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            self.topology.step()
            mean = loss.detach() / world_size
            dist.all_reduce(mean)
            losses.append(float(mean))
        return losses

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "topology": self.topology, "ema": self.ema}

    def save(self, path: Path) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


@dataclass
class Result:
    """What the steps after the save led to.

    Attributes:
        losses: of these steps, over all ranks.
        masks: at the end, by name.
        average: of the weights at the end, by name.
    """

    losses: list[float]
    masks: dict[str, list[int]]
    average: dict[str, list[float]]


def result_of(loop: Loop) -> Result:
    """Trains to the end."""
    losses = loop.train(END)
    state = get_model_state_dict(loop.model, options=StateDictOptions(full_state_dict=True))
    masks = {name: tensor.tolist() for name, tensor in state.items() if name.endswith(".mask")}
    return Result(losses, masks, {name: tensor.flatten().tolist() for name, tensor in loop.ema.state_dict().items()})


def saved(kind: str, path: Path) -> Result:
    """Saves within a growth window and a warm-up, and trains on."""
    loop = Loop(kind)
    loop.train(STOP)
    loop.save(path)
    return result_of(loop)


def resumed(kind: str, path: Path) -> Result:
    """Resumes with a model of other weights, masks and candidates, which the checkpoint replaces."""
    loop = Loop(kind, seed=1)
    loop.load(path)
    assert loop.topology.steps == STOP
    return result_of(loop)


@lru_cache
def saved_by(kind: str, world_size: int, path: Path) -> Result:
    return run_on_ranks(world_size, saved, kind, path)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own")


SAVERS = {"fsdp2": 2, "ddp": 2, "single": 1}
"""By engine, the ranks that save."""
RESUMERS = {"fsdp2": [("single", 1), ("fsdp2", 3)], "ddp": [("fsdp2", 3)], "single": [("ddp", 2)]}
"""By engine that saved, engines and ranks that resume."""


@pytest.mark.parametrize(
    ("saver", "kind", "world_size"), [(saver, *resumer) for saver, resumers in RESUMERS.items() for resumer in resumers]
)
def test_a_loop_saved_within_a_growth_window_resumes_exactly_on_other_ranks(
    folder: Path, saver: str, kind: str, world_size: int
) -> None:
    expected = saved_by(saver, SAVERS[saver], folder / saver)
    assert expected.masks
    for found in run_on_ranks(world_size, resumed, kind, folder / saver):
        assert found.losses == pytest.approx(expected.losses, abs=1e-6)
        assert found.masks == expected.masks
        assert found.average.keys() == expected.average.keys()
        for name, average in expected.average.items():
            assert found.average[name] == pytest.approx(average, abs=1e-5), name


def test_the_engines_train_the_same_and_the_topology_moves(folder: Path) -> None:
    """What the test above compares isn't idle."""
    results = [saved_by(kind, world_size, folder / kind) for kind, world_size in SAVERS.items()]
    for result in results[1:]:
        assert result.losses == pytest.approx(results[0].losses, abs=1e-5)
        assert result.masks == results[0].masks
    (start,) = run_on_ranks(1, first_masks)
    assert all(start[name] != mask for name, mask in results[0].masks.items())


def first_masks() -> dict[str, list[int]]:
    state = get_model_state_dict(Loop("single").model)
    return {name: tensor.tolist() for name, tensor in state.items() if name.endswith(".mask")}
