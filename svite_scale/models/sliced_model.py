"""A sliced model: only its active heads, neurons and tokens exist, as smaller dense matrices and shorter sequences.

This file stands alone: it needs torch, timm and safetensors, and a copy of it lies in every exported folder. In that folder,
``model.json`` has the architecture and the sizes, and ``model.safetensors`` the weights.

    from sliced_model import load
    model = load("FOLDER")      # torch.nn.Module on the CPU, in evaluation mode
    logits = model(images)      # normalised float32 [B, C, H, W] -> [B, classes]
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import trunc_normal_
from torch import Tensor, nn

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
FORMAT = "svite_scale.sliced.v1"
FIELDS = {"format", "architecture", "options", "heads", "neurons", "selectors"}
OPTIONS = {"num_classes", "img_size", "in_chans", "patch_size", "embed_dim", "depth", "num_heads"}
"""The options of timm that a description may have. Others could read files or the network."""

UNIT_DIMENSIONS = {
    "heads": {"qkv.weight": (0, 3), "qkv.bias": (0, 3), "proj.weight": (1, 1)},
    "neurons": {"fc1.weight": (0, 1), "fc1.bias": (0, 1), "fc2.weight": (1, 1)},
}
"""By kind of unit and tensor: the dimension that belongs to units, and how often all units follow each other along it. The rows
of ``qkv`` are the queries of all heads, then the keys, then the values."""

State = dict[str, Tensor]


class DeterministicSelector(nn.Module):
    """Lets the prefix tokens and the patch tokens of highest score pass.

    Each sample's choice is its own, and ties go to the lower index. Scores are computed in fp32, under autocast and for bf16
    inputs too; inputs of fp64 stay in fp64.

    Attributes:
        num_tokens: tokens that pass, prefix tokens included.
        num_prefix: class, distillation and register tokens, which stand first and always pass.
        num_patches: patch tokens that pass.
        mode: ``gather`` shortens the sequence; ``mask`` sets the other tokens to 0 instead.
    """

    def __init__(self, num_tokens: int, num_prefix: int, mode: str = "gather") -> None:
        """See the attributes.

        Raises:
            ValueError: ``num_tokens`` leaves no patch token, or there is no such mode.
        """
        super().__init__()
        if mode not in ("gather", "mask"):
            raise ValueError(f"mode {mode!r} is neither 'gather' nor 'mask'")
        if num_tokens <= num_prefix:
            raise ValueError(f"{num_tokens} tokens leave no patch token beside {num_prefix} prefix tokens")
        self.num_tokens, self.num_prefix, self.num_patches = num_tokens, num_prefix, num_tokens - num_prefix
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, N, embed_dim]`` to ``[batch, num_tokens, embed_dim]``, in the same order; in mode ``mask`` to
        ``[batch, N, embed_dim]``, where the other tokens are 0.
        """
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return torch.cat([prefix, self.select(patches, self.scores(patches), self.num_patches)], dim=1)

    def scores(self, patches: Tensor) -> Tensor:
        """``[batch, patches, embed_dim]`` to fp32 (fp64 for fp64) ``[batch, patches]``."""
        raise NotImplementedError

    def select(self, patches: Tensor, scores: Tensor, count: int) -> Tensor:
        """Leaves out, or sets to 0, the patch tokens that don't have one of the ``count`` highest scores."""
        if count >= patches.shape[1]:
            return patches
        passing = highest(scores, count)
        if self.mode == "gather":
            return patches.gather(1, passing.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        return patches * mask_of(passing, scores).to(patches.dtype).unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, num_prefix={self.num_prefix}, mode={self.mode}"


class LinearSelector(DeterministicSelector):
    """A token's score is its product with :attr:`weight`.

    Attributes:
        weight: ``[1, embed_dim]``, a linear layer's. Not an ``nn.Linear``, and without a bias.
    """

    def __init__(self, embed_dim: int, num_tokens: int, num_prefix: int, mode: str = "gather") -> None:
        """See the attributes of the base class, and its errors."""
        super().__init__(num_tokens, num_prefix, mode)
        self.weight = nn.Parameter(trunc_normal_(torch.empty(1, embed_dim), std=0.02))

    def scores(self, patches: Tensor) -> Tensor:
        dtype = torch.promote_types(patches.dtype, torch.float32)
        return products(patches.to(dtype), self.weight.to(dtype)).squeeze(-1)


class AttentionSelector(DeterministicSelector):
    """A token's score is the mean attention that it gets from learnt queries, see :class:`TokenAttention`."""

    def __init__(self, embed_dim: int, num_queries: int, num_tokens: int, num_prefix: int, mode: str = "gather") -> None:
        """See the attributes of the base class, and its errors. ``num_queries`` is that of the attention."""
        super().__init__(num_tokens, num_prefix, mode)
        self.attention = TokenAttention(embed_dim, num_queries)

    def scores(self, patches: Tensor) -> Tensor:
        attention: Tensor = self.attention(normalised(patches))
        return attention.mean(dim=-1)


class TokenAttention(nn.Module):
    """The attention of a few learnt queries to the normalised patch tokens of an image.

    Attributes:
        queries: ``[num_queries, embed_dim]``. With one query, the keys' matrix of ordinary attention would only turn the query
            into another, and a key's bias would change no attention. So there are no keys.
    """

    def __init__(self, embed_dim: int, num_queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(trunc_normal_(torch.empty(num_queries, embed_dim), std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the attention of each query: normalised tokens ``[batch, N, embed_dim]`` to ``[batch, N, queries]``, of their
        dtype. It is 1 in all for a query.
        """
        return products(tokens, self.queries.to(tokens.dtype)).softmax(dim=1)


def normalised(tokens: Tensor) -> Tensor:
    """Returns tokens with mean 0 and variance 1 each, in fp32 (fp64 for fp64)."""
    return nn.functional.layer_norm(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), tokens.shape[-1:])


def products(tokens: Tensor, weight: Tensor) -> Tensor:
    """Returns the products of tokens ``[batch, N, features]`` with each row of ``weight``, ``[batch, N, rows]``."""
    # Not a matrix product: its rounding depends on the rows that it computes together, so on the batch.
    return torch.stack([(tokens * row).sum(dim=-1) for row in weight.unbind()], dim=-1)


def highest(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the ``count`` highest of the last dimension; ties go to the lower index, unlike in ``topk``."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


def mask_of(passing: Tensor, scores: Tensor) -> Tensor:
    """Returns 1 at the indices ``passing`` of the last dimension and 0 elsewhere, shaped like the scores and of their dtype."""
    return torch.zeros_like(scores).scatter(-1, passing, 1.0)


def build(description: dict[str, Any]) -> nn.Module:
    """Returns a sliced model with random weights, on the CPU, in evaluation mode.

    Args:
        description: the content of a ``model.json``.

    Raises:
        ValueError: it isn't of this format.
    """
    _check(description)
    model: Any = timm.create_model(description["architecture"], pretrained=False, **description["options"])
    for name, sizes in description["heads"].items():
        _slice_heads(model.get_submodule(name), sizes["active"])
    for name, sizes in description["neurons"].items():
        _slice_neurons(model.get_submodule(name), sizes["active"])
    if description["selectors"]:
        _insert_selectors(model, description["selectors"])
    return model.eval()


def _check(description: dict[str, Any]) -> None:
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f"the description has no format {FORMAT!r}, so it is of another program or version")
    if description.keys() != FIELDS:
        raise ValueError(f"the description has the fields {sorted(description)} instead of {sorted(FIELDS)}")
    if not timm.is_model(description["architecture"]):
        raise ValueError(f"timm {timm.__version__} has no model {description['architecture']!r}; install a newer one")
    if unknown := sorted(description["options"].keys() - OPTIONS):
        raise ValueError(f"the options {unknown} aren't among those that a description may have: {sorted(OPTIONS)}")


def _slice_heads(attention: Any, active: int) -> None:
    """Gives timm's ``Attention`` the size of its active heads, in place."""
    qkv, proj = attention.qkv, attention.proj
    attention.num_heads, attention.attn_dim = active, active * attention.head_dim
    attention.qkv = nn.Linear(qkv.in_features, 3 * attention.attn_dim, qkv.bias is not None)
    attention.proj = nn.Linear(attention.attn_dim, proj.out_features, proj.bias is not None)
    attention.register_buffer("active_heads", torch.arange(active))


def _slice_neurons(mlp: Any, active: int) -> None:
    """Gives timm's ``Mlp`` the size of its active hidden neurons, in place."""
    fc1, fc2 = mlp.fc1, mlp.fc2
    mlp.fc1 = nn.Linear(fc1.in_features, active, fc1.bias is not None)
    mlp.fc2 = nn.Linear(active, fc2.out_features, fc2.bias is not None)
    mlp.register_buffer("active_neurons", torch.arange(active))


def _insert_selectors(model: Any, selectors: dict[str, dict[str, Any]]) -> None:
    """Puts a selector of these arguments, by name of a block, before each of these blocks, in place."""
    items: OrderedDict[str, nn.Module] = OrderedDict()
    for name, block in model.blocks.named_children():
        if name in selectors:
            # Exports of earlier versions name no kind of selector; theirs are linear.
            kind = AttentionSelector if "num_queries" in selectors[name] else LinearSelector
            items[f"selector{name}"] = kind(model.embed_dim, **selectors[name])
        items[name] = block
    model.blocks = nn.Sequential(items)


def save(model: nn.Module, description: dict[str, Any], folder: str | Path) -> None:
    """Writes the two files of a sliced model into an existing folder. ``description`` is what the model was built from."""
    (Path(folder) / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
    save_file(model.state_dict(), Path(folder) / WEIGHTS)


def read_description(folder: str | Path) -> dict[str, Any]:
    """Returns the content of a folder's ``model.json``.

    Raises:
        OSError: it can't be read.
        ValueError: it isn't of this format.
    """
    description: dict[str, Any] = json.loads((Path(folder) / DESCRIPTION).read_text())
    _check(description)
    return description


def load(folder: str | Path) -> nn.Module:
    """Returns the sliced model of a folder, on the CPU, in evaluation mode.

    Raises:
        OSError: a file can't be read.
        ValueError: ``model.json`` isn't of this format.
        RuntimeError: ``model.safetensors`` has other tensors, or tensors of other shapes.
    """
    model = build(read_description(folder))
    model.load_state_dict(load_file(Path(folder) / WEIGHTS))
    return model


def dense_state_dict(folder: str | Path) -> State:
    """Returns the tensors of a folder's model in the shapes of the dense timm model: absent heads and neurons are zeros.

    With token selectors, their weights are there too, as ``blocks.selector<i>...``: timm's model has no place for them.

    Raises:
        OSError, ValueError, RuntimeError: see :func:`load`.
    """
    description = read_description(folder)
    return expand_units(load(folder).state_dict(), description)


def expand_units(state: State, description: dict[str, Any]) -> State:
    """Returns a sliced model's state dict in dense shapes, without the numbers of the active units."""
    state = dict(state)
    for kind, dimensions in UNIT_DIMENSIONS.items():
        for name, sizes in description[kind].items():
            active = state.pop(f"{name}.active_{kind}")
            for tensor, (dimension, repeats) in dimensions.items():
                if (key := f"{name}.{tensor}") in state:
                    state[key] = _expand(state[key], dimension, repeats, active, sizes["of"])
    return state


def slice_units(state: State, active_units: dict[str, dict[str, Tensor]]) -> State:
    """Returns a dense model's state dict with the active units only, and their numbers: the inverse of :func:`expand_units`.

    Args:
        state: of the dense model.
        active_units: by kind of unit and module name, bool ``[units]``.
    """
    state = dict(state)
    for kind, modules in active_units.items():
        for name, active in modules.items():
            state[f"{name}.active_{kind}"] = active.nonzero().squeeze(1)
            for tensor, (dimension, repeats) in UNIT_DIMENSIONS[kind].items():
                if (key := f"{name}.{tensor}") in state:
                    by_unit = state[key].unflatten(dimension, (repeats, active.numel(), -1))
                    rows = by_unit.index_select(dimension + 1, state[f"{name}.active_{kind}"])
                    state[key] = rows.flatten(dimension, dimension + 2)
    return state


def _expand(tensor: Tensor, dimension: int, repeats: int, active: Tensor, units: int) -> Tensor:
    by_unit = tensor.unflatten(dimension, (repeats, active.numel(), -1))
    shape = list(by_unit.shape)
    shape[dimension + 1] = units
    whole = tensor.new_zeros(shape).index_copy(dimension + 1, active, by_unit)
    return whole.flatten(dimension, dimension + 2)
