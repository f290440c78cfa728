"""A forward without backward, at any time, changes nothing: under FSDP2 it leaves the root's weights gathered."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import svite_scale
from tests.ranks import run_on_ranks

OPTIONS = svite_scale.TopologyOptions(grow_window=2, grown_warmup_steps=3)
STEPS = 9
"""With updates after steps 4 and 8."""


def trained(*, evaluated: bool) -> list[Tensor]:
    """The full parameters after training. A collective."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    svite_scale.sparsify(model, 0.37)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def evaluate() -> None:
        if evaluated:
            with torch.no_grad():
                model(torch.ones(2, 12))

    evaluate()
    topology = svite_scale.attach(model, optimizer, total_steps=100, update_every=4, options=OPTIONS)
    for step in range(1, STEPS + 1):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(x), torch.arange(8) % 4).backward()
        evaluate()
        optimizer.step()
        optimizer.zero_grad()
        evaluate()
        update = topology.step()
        assert (update is not None) == (step % 4 == 0)
        evaluate()
        if step == 5:  # within a warm-up
            state = topology.state_dict()
            topology.detach()
            evaluate()
            topology = svite_scale.attach(model, optimizer, total_steps=100, update_every=4, options=OPTIONS)
            evaluate()
            topology.load_state_dict(state)
    model.reshard()  # type: ignore[operator]
    return [parameter.full_tensor().detach() for parameter in model.parameters() if isinstance(parameter, DTensor)]


def trained_with_and_without() -> list[tuple[Tensor, Tensor]]:
    return list(zip(trained(evaluated=True), trained(evaluated=False), strict=True))


def test_evaluation_forwards_change_nothing() -> None:
    for pairs in run_on_ranks(2, trained_with_and_without):
        assert len(pairs) == 6
        for found, expected in pairs:
            assert torch.equal(found, expected)
