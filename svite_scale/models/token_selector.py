"""The learnable token selector: which tokens the next block gets (arXiv:2106.04533, section 3.3, SViTE+)."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from svite_scale.errors import OptionError
from svite_scale.models.options import TokensConfig
from svite_scale.models.sliced_model import DeterministicSelector
from svite_scale.sparsity.access import Annealed
from svite_scale.sparsity.layers.plain_layer import refuse_wrapped


class TokenSelector(DeterministicSelector, Annealed):
    """A :class:`~svite_scale.models.sliced_model.DeterministicSelector` that learns.

    In training, Gumbel noise is added to the log-softmax of the scores, and the patch tokens of highest sum pass: a draw
    without replacement from softmax(scores), whatever the temperature. The temperature sets the gradient. With
    p = softmax((log-softmax + noise) / temperature) over the patch tokens, a token that passes is multiplied by
    1 + p - stop_gradient(p): by exactly 1, with the gradient of p. So the scores learn through the tokens that pass.

    In evaluation there is no noise. The softmax would cancel a bias, and ``sparsify`` leaves the weight dense.

    Attributes:
        generator: of the noise, on the inputs' device; None draws from torch's global generator, the only one from which
            activation checkpointing draws the same noise again.
    """

    def __init__(
        self,
        embed_dim: int,
        num_tokens: int,
        num_prefix: int,
        *,
        mode: str = "gather",
        temperature: float = 10.0,
        final_temperature: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        """The arguments are described above and in :meth:`anneal`.

        Raises:
            ValueError: ``num_tokens`` leaves no patch token, or there is no such mode.
        """
        super().__init__(embed_dim, num_tokens, num_prefix, mode)
        self.generator = generator
        self.temperatures = (temperature, final_temperature)
        # A tensor, because a compiled forward is compiled again when a number changes. No buffer, because DDP would send it at
        # every forward and ZeRO would round it. On the CPU, because operations on every device take such a tensor as a number.
        self._temperature = torch.tensor(temperature, dtype=torch.float64, device="cpu")

    @property
    def temperature(self) -> float:
        """The divisor of the noisy log-probabilities."""
        return self._temperature.item()

    def anneal(self, progress: float) -> None:
        """Sets the temperature of the next forward. ``topology.step()`` of an attached topology engine calls it.

        Args:
            progress: fraction of training that is done, 0 to 1. It must not change between a forward and its backward.

        Raises:
            OptionError: the progress is outside 0 to 1.
        """
        if not 0.0 <= progress <= 1.0:
            raise OptionError("progress", progress, "is outside 0 to 1", "give the fraction of training that is done")
        self._temperature.fill_(self.temperature_at(progress))

    def temperature_at(self, progress: float) -> float:
        """Returns the temperature at a fraction of training: a line from the first to the final one, as in the paper's code."""
        first, final = self.temperatures
        return first + (final - first) * progress

    def forward(self, x: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: N is below ``num_tokens``.
        """
        if x.shape[1] < self.num_tokens:
            raise ValueError(f"can't keep {self.num_tokens} of {x.shape[1]} tokens")
        if not self.training:
            return super().forward(x)
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        scores = self.scores(patches).log_softmax(dim=-1)
        scores = scores + self._gumbel(scores)
        soft = (scores / self._temperature).softmax(dim=-1)
        patches = patches * (soft - soft.detach() + 1).to(x.dtype).unsqueeze(-1)
        return torch.cat([prefix, self.select(patches, scores.detach())], dim=1)

    def _gumbel(self, like: Tensor) -> Tensor:
        exponential = torch.empty_like(like).exponential_(generator=self.generator)
        # A draw of exactly 0 would make the noise infinite.
        return -exponential.clamp_min(torch.finfo(like.dtype).tiny).log()


def insert_token_selectors(
    model: nn.Module,
    *,
    keep: float,
    blocks: Sequence[int] = TokensConfig.blocks,
    mode: str = TokensConfig.mode,
    temperature: float = TokensConfig.temperature,
    final_temperature: float = TokensConfig.final_temperature,
    generator: torch.Generator | None = None,
) -> list[TokenSelector]:
    """Puts a token selector before each of the given blocks of a VisionTransformer, in place.

    Call it before any engine wraps the model, and once for all blocks. ``sparsify`` and ``pack_units`` may come before it or
    after it. The temperature falls with each ``topology.step()`` of an attached topology engine; in a loop without one, call
    ``selector.anneal(step / total_steps)`` before each step.

    A selector becomes an item ``selector<i>`` of ``model.blocks``, right before the item ``<i>``. All other names stay, and
    timm's loop over the items, with activation checkpointing or without, calls it like a block. It belongs to no block, so
    FSDP2 gathers it with the root's parameters and ZeRO-3 by itself.

    Args:
        model: timm's VisionTransformer; its weights stay as they are. The selectors' weights are drawn from torch's global
            generator.
        keep: tokens that pass, class, distillation and register tokens among them: up to 1 a fraction of those that reach the
            selector, rounded half up; above 1 a count.
        blocks: indices of blocks, ascending; 0 is after the embedding.
        mode: ``gather`` shortens the sequence; ``mask`` multiplies by zero instead, as the paper's code does.
        temperature: of the Gumbel softmax at the start of training.
        final_temperature: the same at the end.
        generator: of the noise; see :class:`TokenSelector`.

    Returns:
        The selectors in order.

    Raises:
        OptionError: a value is out of range, the model is no VisionTransformer, there is no such block, or not so many tokens,
            or no patch token would be left; it is a ValueError too.
        TopologyError: an engine has wrapped the model already.
        ValueError: the model has selectors already; or a generator is given, though activation checkpointing would draw other
            noise from it for the backward.
    """
    options = TokensConfig(
        keep=keep,
        blocks=tuple(blocks),
        mode=mode,  # type: ignore[arg-type]
        temperature=temperature,
        final_temperature=final_temperature,
    )
    if keep is None:
        raise OptionError("keep", keep, "lets all tokens pass", "say how many pass, 0.9 say")
    vit = require_vision_transformer(model, "keep", keep)
    if token_selectors(model):
        raise ValueError("the model has token selectors already; name the blocks of all of them in one call")
    if generator is not None and vit.grad_checkpointing:
        raise ValueError("activation checkpointing repeats the noise of torch's global generator only; leave generator out")
    depth, num_tokens = len(vit.blocks), vit.patch_embed.num_patches + vit.num_prefix_tokens
    if not set(options.blocks) <= set(range(depth)):
        raise OptionError("blocks", list(options.blocks), f"the model has {depth} blocks", f"use 0 to {depth - 1}")
    items: OrderedDict[str, nn.Module] = OrderedDict()
    for index, block in enumerate(vit.blocks):
        if index in options.blocks:
            kept = kept_tokens(keep, num_tokens, vit.num_prefix_tokens)
            items[f"selector{index}"] = TokenSelector(
                vit.embed_dim,
                kept,
                vit.num_prefix_tokens,
                mode=mode,
                temperature=temperature,
                final_temperature=final_temperature,
                generator=generator,
            )
            num_tokens = kept if mode == "gather" else num_tokens
        items[str(index)] = block
    vit.blocks = nn.Sequential(items)
    return token_selectors(model)


def require_vision_transformer(model: nn.Module, field: str, value: object) -> VisionTransformer:
    """Returns the model if it is timm's VisionTransformer, whose blocks are alike and take any tokens, in any number.

    Raises:
        OptionError: it isn't; ``field`` asks for what only such a model can have.
        TopologyError: an engine has wrapped the model already.
    """
    refuse_wrapped(model)
    if isinstance(model, VisionTransformer):
        return model
    raise OptionError(
        field,
        value,
        f"needs the blocks of timm's VisionTransformer, which take any tokens; those of a {type(model).__name__} have other "
        "parts, or go by the places of tokens",
        "leave it out, or use a VisionTransformer, such as deit_tiny_patch16_224",
    )


def kept_tokens(keep: float, num_tokens: int, num_prefix: int) -> int:
    """Returns the number of tokens that pass a selector. ``num_tokens`` reach it; ``num_prefix`` prefix tokens are in both.

    Raises:
        OptionError: there aren't so many, or no patch token would be left.
    """
    kept = math.floor(keep * num_tokens + 0.5) if keep <= 1 else int(keep)
    if kept > num_tokens:
        raise OptionError("keep", keep, f"only {num_tokens} tokens reach the selector", "lower it")
    if kept <= num_prefix:
        problem = f"keeps {kept} of {num_tokens} tokens, and the {num_prefix} prefix tokens always stay, so no patch would"
        raise OptionError("keep", keep, problem, "raise it")
    return kept


def token_selectors(model: nn.Module) -> list[TokenSelector]:
    """Returns the selectors of a model, wrapped by an engine or not, in order."""
    return [module for module in model.modules() if isinstance(module, TokenSelector)]
