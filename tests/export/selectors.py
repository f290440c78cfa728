"""Token selectors put into a model by hand, which choose by a score that a test can compute too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn


class Selector(nn.Module):
    """Lets the prefix tokens pass, and of the others those of largest sum; evaluation only.

    Attributes:
        seen: what reached it last, ``[B, N, D]``.
    """

    def __init__(self, num_patches: int, num_prefix: int, mode: str) -> None:
        super().__init__()
        self.num_patches, self.num_prefix, self.mode = num_patches, num_prefix, mode
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach()
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        chosen = patches.detach().sum(dim=-1).topk(self.num_patches).indices.sort().values
        if self.mode == "mask":
            passing = torch.zeros(patches.shape[:2]).scatter(1, chosen, 1.0)
            return torch.cat([prefix, patches * passing.unsqueeze(-1)], dim=1)
        return torch.cat([prefix, patches.gather(1, chosen.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))], dim=1)


def insert(model: VisionTransformer, num_patches: Mapping[int, int], mode: str) -> list[Selector]:
    """Puts a selector before each of the blocks that lets so many patches pass."""
    items: OrderedDict[str, nn.Module] = OrderedDict()
    for index, block in enumerate(model.blocks):
        if index in num_patches:
            items[f"selector{index}"] = Selector(num_patches[index], model.num_prefix_tokens, mode)
        items[str(index)] = block
    model.blocks = nn.Sequential(items)
    return [item for item in items.values() if isinstance(item, Selector)]
