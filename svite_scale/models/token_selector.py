"""Token selectors in training: which tokens the next block gets (arXiv:2106.04533, section 3.3, SViTE+)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from svite_scale.errors import OptionError
from svite_scale.models.sliced_model import (
    AttentionSelector,
    DeterministicSelector,
    LinearSelector,
    highest,
    mask_of,
    normalised,
)
from svite_scale.sparsity.access import Annealed, AuxiliaryClassifier, auxiliary_classifiers

NUM_QUERIES = 4
VALUE_DIM = 16
"""Numbers that the classifier of a selector keeps of the tokens that a query attends to."""

LEVELS = 8
"""Numbers of tokens that pass while ``keep`` falls, all and the last among them. Few: a compiler may compile for each."""


@dataclass(frozen=True)
class PassingPatches:
    """The number of patch tokens that pass a selector in training, by the progress of training.

    Attributes:
        all: patch tokens of an image.
        kept: patch tokens that pass for most of training.
        warmup: fraction of training in which the number falls from ``all`` to ``kept``, by a cosine in :data:`LEVELS` levels.
        until: fraction of training after which all tokens pass again; None if they never do.
    """

    all: int
    kept: int
    warmup: float = 0.0
    until: float | None = None

    def at(self, progress: float) -> int:
        """Returns the number at a fraction of training."""
        if self.until is not None and progress >= self.until:
            return self.all
        if progress >= self.warmup:
            return self.kept
        fallen = math.floor((LEVELS - 1) * progress / self.warmup) / (LEVELS - 1)
        return self.kept + round((self.all - self.kept) * 0.5 * (1.0 + math.cos(math.pi * fallen)))


class TokenSelector(DeterministicSelector, Annealed):
    """Base of the selectors of a model in training.

    In evaluation the selector is deterministic: exactly :attr:`num_patches` patch tokens pass. A selector that is there for
    training only lets all of them pass then.

    Attributes:
        patches: the schedule of the patch tokens that pass in training.
        passing: patch tokens that pass in the next forward in training.
        only_in_training: whether all tokens pass in evaluation.
    """

    patches: PassingPatches
    passing: int

    def macs(self, num_patches: int, *, training: bool) -> int:
        """Returns the multiply-accumulates of a forward that ``num_patches`` patch tokens of one image reach."""
        raise NotImplementedError

    @property
    def only_in_training(self) -> bool:
        return self.patches.until is not None

    def schedule(self, patches: PassingPatches) -> None:
        """Sets the schedule, at the start of training."""
        self.patches, self.passing = patches, patches.at(0.0)

    def tokens_at(self, progress: float) -> int:
        """Returns the tokens that pass in training at a fraction of it, prefix tokens included."""
        return self.num_prefix + self.patches.at(progress)

    def anneal(self, progress: float) -> None:
        """Prepares the next forward in training. ``topology.step()`` of an attached topology engine calls it.

        Args:
            progress: fraction of training that is done, 0 to 1. It must not change between a forward and its backward.

        Raises:
            OptionError: the progress is outside 0 to 1.
        """
        if not 0.0 <= progress <= 1.0:
            raise OptionError("progress", progress, "is outside 0 to 1", "give the fraction of training that is done")
        self.passing = self.patches.at(progress)

    def forward(self, x: Tensor) -> Tensor:
        """See the base class; in training :attr:`passing` patch tokens pass.

        Raises:
            ValueError: N is below ``num_tokens``.
        """
        if x.shape[1] < self.num_tokens:
            raise ValueError(f"can't keep {self.num_tokens} of {x.shape[1]} tokens")
        if not self.training:
            return x if self.only_in_training else super().forward(x)
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        return torch.cat([prefix, self.select_in_training(patches)], dim=1)

    def select_in_training(self, patches: Tensor) -> Tensor:
        """Returns what passes of the patch tokens ``[batch, N, embed_dim]`` in training."""
        raise NotImplementedError


class ClassifierSelector(TokenSelector, AttentionSelector, AuxiliaryClassifier):
    """A selector that learns by classifying the image itself, from all tokens that reach it, the dropped ones too.

    The tokens are detached: the classifier's loss, :func:`selector_loss`, has no gradient for the rest of the model. A token's
    score is its mean attention in this classification; there is no noise. The gradient of the model's loss flows through the
    tokens that pass as through any gather, and none of it through the scores.
    """

    def __init__(self, embed_dim: int, num_tokens: int, num_prefix: int, *, mode: str = "gather", num_classes: int) -> None:
        """See the attributes.

        Raises:
            ValueError: ``num_tokens`` leaves no patch token, or there is no such mode.
        """
        super().__init__(embed_dim, NUM_QUERIES, num_tokens, num_prefix, mode)
        self.classifier = TokenClassifier(embed_dim, num_classes)
        self.schedule(PassingPatches(self.num_patches, self.num_patches))

    def macs(self, num_patches: int, *, training: bool) -> int:
        scores = self.attention.queries.numel() * num_patches
        # In training as many again for what the queries attend to, and then the classifier's two matrices.
        return 2 * scores + self.classifier.projection.numel() + self.classifier.weight.numel() if training else scores

    def select_in_training(self, patches: Tensor) -> Tensor:
        tokens = normalised(patches.detach())
        attention = self.attention(tokens)
        # Before the selection: so backward comes to the classifier after the selected tokens, when an engine that shards the
        # selector by itself has gathered it.
        if torch.is_grad_enabled():
            self.logits = self.classifier(attention, tokens)
        return self.select(patches, attention.detach().mean(dim=-1), self.passing)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has no part in the graph of the last forward, and couldn't copy it.
        return {**self.__dict__, "logits": None}


class TokenClassifier(nn.Module):
    """Classifies an image by the tokens that a few queries attend to. ``sparsify`` leaves it dense: it has no ``nn.Linear``.

    Attributes:
        projection: ``[queries * VALUE_DIM, embed_dim]``, the values: what is kept of the tokens that each query attends to.
        weight: ``[classes, queries * VALUE_DIM]``.
        bias: ``[classes]``.
    """

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        values = NUM_QUERIES * VALUE_DIM
        self.projection = nn.Parameter(trunc_normal_(torch.empty(values, embed_dim), std=embed_dim**-0.5))
        self.weight = nn.Parameter(trunc_normal_(torch.empty(num_classes, values), std=0.02))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, attention: Tensor, tokens: Tensor) -> Tensor:
        """Returns logits ``[batch, classes]``.

        Args:
            attention: of each query to the tokens, ``[batch, N, queries]``.
            tokens: normalised, ``[batch, N, embed_dim]``.
        """
        pooled = attention.transpose(1, 2) @ tokens
        projection = self.projection.to(pooled.dtype).unflatten(0, (NUM_QUERIES, VALUE_DIM))
        values = torch.einsum("bqd,qvd->bqv", pooled, projection).flatten(1)
        return F.linear(values, self.weight.to(values.dtype), self.bias.to(values.dtype))


class PaperSelector(TokenSelector, LinearSelector):
    """The selector of the paper's code: a linear layer, which learns through the scale of the tokens.

    In training, Gumbel noise is added to the log-softmax of the scores, and the patch tokens of highest sum pass: a draw
    without replacement from softmax(scores), whatever the temperature. The temperature sets the gradient. With
    p = softmax((log-softmax + noise) / temperature) over the patch tokens, a token is multiplied by hard + p -
    stop_gradient(p), where hard is 1 for a token that passes and 0 for another: by exactly 1 or 0, with the gradient of p. In
    mode ``gather`` the others are absent, so only those that pass give p a gradient. In mode ``mask`` the others give it one
    too, through the next LayerNorm.

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
        self.schedule(PassingPatches(self.num_patches, self.num_patches))
        self.generator = generator
        self.temperatures = (temperature, final_temperature)
        # A tensor, because a compiled forward is compiled again when a number changes. No buffer, because DDP would send it at
        # every forward and ZeRO would round it. On the CPU, because operations on every device take such a tensor as a number.
        self._temperature = torch.tensor(temperature, dtype=torch.float64, device="cpu")

    def macs(self, num_patches: int, *, training: bool) -> int:
        return self.weight.numel() * num_patches

    @property
    def temperature(self) -> float:
        """The divisor of the noisy log-probabilities."""
        return self._temperature.item()

    def anneal(self, progress: float) -> None:
        """Sets the temperature of the next forward too, see the base class."""
        super().anneal(progress)
        self._temperature.fill_(self.temperature_at(progress))

    def temperature_at(self, progress: float) -> float:
        """Returns the temperature at a fraction of training: a line from the first to the final one, as in the paper's code."""
        first, final = self.temperatures
        return first + (final - first) * progress

    def select_in_training(self, patches: Tensor) -> Tensor:
        scores = self.scores(patches).log_softmax(dim=-1)
        scores = scores + self._gumbel(scores)
        soft = (scores / self._temperature).softmax(dim=-1)
        scores = scores.detach()
        if self.mode == "gather":
            return self.select(patches * (soft - soft.detach() + 1).to(patches.dtype).unsqueeze(-1), scores, self.passing)
        hard = mask_of(highest(scores, self.passing), scores)
        return patches * (soft - soft.detach() + hard).to(patches.dtype).unsqueeze(-1)

    def _gumbel(self, like: Tensor) -> Tensor:
        exponential = torch.empty_like(like).exponential_(generator=self.generator)
        # A draw of exactly 0 would make the noise infinite.
        return -exponential.clamp_min(torch.finfo(like.dtype).tiny).log()


class RandomSelector(TokenSelector):
    """Passes patch tokens that are drawn for each sample by itself, in training only; it has nothing to learn."""

    def macs(self, num_patches: int, *, training: bool) -> int:
        return 0

    def select_in_training(self, patches: Tensor) -> Tensor:
        return self.select(patches, self.scores(patches), self.passing)

    def scores(self, patches: Tensor) -> Tensor:
        return torch.rand(patches.shape[:2], device=patches.device)


def selector_loss(model: nn.Module, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Returns the loss from which token selectors of the signal ``classifier`` learn: the sum of their cross entropies, fp32.

    Add it to the loss of each micro-batch, after the model's forward in training mode::

        loss = F.cross_entropy(model(images), labels) + svite_scale.selector_loss(model, labels)

    Its gradient reaches only the selectors' own parameters, so it changes the rest of the model through the clipping of the
    gradient's global norm alone. Local.

    Args:
        model: with token selectors or without, for which the loss is 0; wrapped by an engine or not.
        targets: labels ``[batch]``, or fractions of classes ``[batch, classes]``, of the images of that forward.
        label_smoothing: smoothing that the targets don't have yet.

    Raises:
        TopologyError: there was no such forward since the last call.
    """
    losses = [
        F.cross_entropy(classifier.take_logits().float(), targets, label_smoothing=label_smoothing)
        for classifier in auxiliary_classifiers(model)
    ]
    return torch.stack(losses).sum() if losses else torch.zeros((), device=targets.device)


def token_selectors(model: nn.Module) -> list[TokenSelector]:
    """Returns the selectors of a model, wrapped by an engine or not, in order."""
    return [module for module in model.modules() if isinstance(module, TokenSelector)]
