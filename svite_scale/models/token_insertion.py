"""Putting token selectors into a VisionTransformer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from timm.models import VisionTransformer
from torch import nn

from svite_scale.errors import OptionError
from svite_scale.models.options import TokensConfig
from svite_scale.models.token_selector import (
    ClassifierSelector,
    PaperSelector,
    PassingPatches,
    RandomSelector,
    TokenSelector,
    token_selectors,
)
from svite_scale.sparsity.layers.plain_layer import refuse_wrapped


def insert_token_selectors(
    model: nn.Module,
    *,
    keep: float | None = None,
    training_keep: float | None = None,
    training_keep_until: float = TokensConfig.training_keep_until,
    signal: str = TokensConfig.signal,
    blocks: Sequence[int] = TokensConfig.blocks,
    mode: str = TokensConfig.mode,
    keep_warmup: float = TokensConfig.keep_warmup,
    temperature: float = TokensConfig.temperature,
    final_temperature: float = TokensConfig.final_temperature,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> list[TokenSelector]:
    """Puts a token selector before each of the given blocks of a VisionTransformer, in place.

    Call it before any engine wraps the model, and once for all blocks. ``sparsify`` and ``pack_units`` may come before it or
    after it. With the signal ``classifier``, add :func:`~svite_scale.models.token_selector.selector_loss` to the loss. Each
    ``topology.step()`` of an attached topology engine sets how many tokens pass next, and the temperature; in a loop without
    one, call ``selector.anneal(step / total_steps)`` before each step.

    A selector becomes an item ``selector<i>`` of ``model.blocks``, right before the item ``<i>``. All other names stay, and
    timm's loop over the items, with activation checkpointing or without, calls it like a block. It belongs to no block, so
    FSDP2 gathers it with the root's parameters and ZeRO-3 by itself.

    Args:
        model: timm's VisionTransformer; its weights stay as they are. The selectors' weights are drawn from torch's global
            generator.
        keep: tokens that pass, class, distillation and register tokens among them: up to 1 a fraction of those that reach the
            selector, rounded half up; above 1 a count.
        training_keep: in place of ``keep``: the fraction of the patch tokens that pass in training; in evaluation all pass.
        training_keep_until: fraction of training after which all tokens pass in training too, with ``training_keep``.
        signal: where the scores come from: ``classifier``, ``paper``, or ``random``, for ``training_keep`` only.
        blocks: indices of blocks, ascending; 0 is after the embedding.
        mode: ``gather`` shortens the sequence; ``mask`` multiplies by zero instead, as the paper's code does.
        keep_warmup: fraction of training in which the tokens that pass fall from all to ``keep``, by a cosine in a few steps.
        temperature: of the Gumbel softmax at the start of training, for the signal ``paper``.
        final_temperature: the same at the end.
        num_classes: of the selectors' classifiers; None takes the model's.
        generator: of the noise; see :class:`~svite_scale.models.token_selector.PaperSelector`.

    Returns:
        The selectors in order.

    Raises:
        OptionError: a value is out of range, the model is no VisionTransformer, there is no such block, or not so many tokens,
            or no patch token would be left; it is a ValueError too.
        TopologyError: an engine has wrapped the model already.
        ValueError: the model has selectors already; or a generator is given, though the signal has no noise, or activation
            checkpointing would draw other noise from it for the backward.
    """
    options = TokensConfig(
        keep=keep,
        training_keep=training_keep,
        training_keep_until=training_keep_until,
        signal=signal,  # type: ignore[arg-type]
        blocks=tuple(blocks),
        mode=mode,  # type: ignore[arg-type]
        keep_warmup=keep_warmup,
        temperature=temperature,
        final_temperature=final_temperature,
    )
    if not options.has_selectors:
        raise OptionError("keep", keep, "lets all tokens pass", "say how many pass, 0.9 say")
    field, value = ("keep", keep) if keep is not None else ("training_keep", training_keep)
    vit = require_vision_transformer(model, field, value)
    if token_selectors(model):
        raise ValueError("the model has token selectors already; name the blocks of all of them in one call")
    if generator is not None and signal != "paper":
        raise ValueError(f"the signal {signal} has no noise; leave generator out")
    if generator is not None and vit.grad_checkpointing:
        raise ValueError("activation checkpointing repeats the noise of torch's global generator only; leave generator out")
    depth = len(vit.blocks)
    if not set(options.blocks) <= set(range(depth)):
        raise OptionError("blocks", list(options.blocks), f"the model has {depth} blocks", f"use 0 to {depth - 1}")
    classes = vit.num_classes if num_classes is None else num_classes
    if signal == "classifier" and not classes:
        raise OptionError(
            "num_classes", num_classes, "is missing, and the model has no head", "give the classes of the targets"
        )
    selectors = _selectors(vit, options, classes, generator)
    items: OrderedDict[str, nn.Module] = OrderedDict()
    for index, block in enumerate(vit.blocks):
        if index in options.blocks:
            items[f"selector{index}"] = next(selectors)
        items[str(index)] = block
    vit.blocks = nn.Sequential(items)
    return token_selectors(model)


def remove_token_selectors(model: nn.Module) -> None:
    """Removes the selectors of a VisionTransformer, in place."""
    items = cast(nn.Module, model.blocks).named_children()
    model.blocks = nn.Sequential(OrderedDict((name, item) for name, item in items if not isinstance(item, TokenSelector)))


def _selectors(
    vit: VisionTransformer, options: TokensConfig, num_classes: int, generator: torch.Generator | None
) -> Iterator[TokenSelector]:
    """Yields the selectors in order."""
    num_prefix, num_patches = vit.num_prefix_tokens, vit.patch_embed.num_patches
    reaching = num_prefix + num_patches
    for _ in options.blocks:
        kept = kept_tokens(options, reaching, num_prefix)
        selector: TokenSelector
        if options.signal == "classifier":
            selector = ClassifierSelector(vit.embed_dim, kept, num_prefix, mode=options.mode, num_classes=num_classes)
        elif options.signal == "paper":
            selector = PaperSelector(
                vit.embed_dim,
                kept,
                num_prefix,
                mode=options.mode,
                temperature=options.temperature,
                final_temperature=options.final_temperature,
                generator=generator,
            )
        else:
            selector = RandomSelector(kept, num_prefix)
        until = None if options.training_keep is None else options.training_keep_until
        warmup = options.keep_warmup if options.training_keep is None else 0.0
        selector.schedule(PassingPatches(num_patches, kept - num_prefix, warmup, until))
        yield selector
        reaching = kept if options.mode == "gather" else reaching


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


def kept_tokens(options: TokensConfig, num_tokens: int, num_prefix: int) -> int:
    """Returns the number of tokens that pass a selector. ``num_tokens`` reach it; ``num_prefix`` prefix tokens are in both.

    Raises:
        OptionError: there aren't so many, or no patch token would be left.
    """
    if options.training_keep is not None:
        return num_prefix + max(1, math.floor(options.training_keep * (num_tokens - num_prefix) + 0.5))
    keep = cast(float, options.keep)
    kept = math.floor(keep * num_tokens + 0.5) if keep <= 1 else int(keep)
    if kept > num_tokens:
        raise OptionError("keep", keep, f"only {num_tokens} tokens reach the selector", "lower it")
    if kept <= num_prefix:
        problem = f"keeps {kept} of {num_tokens} tokens, and the {num_prefix} prefix tokens always stay, so no patch would"
        raise OptionError("keep", keep, problem, "raise it")
    return kept
