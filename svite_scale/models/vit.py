"""timm VisionTransformers from a config."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import nn

from svite_scale.config import ModelConfig
from svite_scale.errors import ConfigError
from svite_scale.models.token_selector import TokenSelector


def build_vit(config: ModelConfig) -> VisionTransformer:
    """The dense model, randomly initialised from torch's global generator, on torch's default device.

    Raises:
        ConfigError: timm has no such VisionTransformer, or the sizes don't fit together.
    """
    check_model(config)
    model = cast(VisionTransformer, timm.create_model(config.name, pretrained=False, **_options(config)))
    model.set_grad_checkpointing(config.activation_checkpointing)
    return model


def blocks(model: VisionTransformer) -> list[nn.Module]:
    """The transformer blocks, which FSDP2 gathers one at a time, without the token selectors between them."""
    return [block for block in model.blocks if not isinstance(block, TokenSelector)]


def check_model(config: ModelConfig) -> None:
    """Checks that the model exists and its sizes fit, on the meta device.

    Raises:
        ConfigError: names the field and the remedy.
    """
    if config.name not in timm.list_models("*vit*") + timm.list_models("deit*"):
        raise ConfigError("model.name", config.name, "is no VisionTransformer that timm knows", _nearest(config.name))
    with torch.device("meta"):
        base = timm.create_model(config.name, pretrained=False)
    if not isinstance(base, VisionTransformer):
        raise ConfigError(
            "model.name", config.name, f"is a {type(base).__name__}", "use a VisionTransformer, such as deit_tiny_patch16_224"
        )
    if base.attn_pool is not None or not isinstance(base.patch_embed, PatchEmbed):
        raise ConfigError(
            "model.name", config.name, "has a convolutional stem or attention pooling", "use a plain VisionTransformer"
        )
    if not (hasattr(base.blocks[0], "attn") and hasattr(base.blocks[0], "mlp")):
        raise ConfigError(
            "model.name",
            config.name,
            f"has blocks without an attention and an MLP of their own ({type(base.blocks[0]).__name__})",
            "use a plain VisionTransformer",
        )
    patch_size = config.patch_size or base.patch_embed.patch_size[0]
    if config.image_size % patch_size:
        raise ConfigError(
            "model.image_size", config.image_size, f"is not divisible by the patch size ({patch_size})", "use a multiple"
        )
    embed_dim, num_heads = config.embed_dim or base.embed_dim, config.num_heads or base.blocks[0].attn.num_heads
    if embed_dim % num_heads:
        raise ConfigError("model.num_heads", num_heads, f"does not divide model.embed_dim ({embed_dim})", "use a divisor of it")
    with torch.device("meta"):
        create("model.name", config.name, _options(config), "use another model, or leave out some of the sizes")


def create(field: str, name: str, options: dict[str, Any], remedy: str) -> nn.Module:
    """A model of timm, without its weights.

    Raises:
        ConfigError: ``field`` names a model that timm can't build so.
    """
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=False, **options))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        sizes = ", ".join(f"{option}={value}" for option, value in options.items())
        raise ConfigError(field, name, f"can't be built with {sizes} ({str(error) or type(error).__name__})", remedy) from error


def _options(config: ModelConfig) -> dict[str, Any]:
    """What timm is asked for; a size that is None is left to the model."""
    overrides = {name: getattr(config, name) for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    return {
        "num_classes": config.num_classes,
        "img_size": config.image_size,
        "in_chans": config.in_channels,
        "drop_path_rate": config.drop_path,
        **{name: size for name, size in overrides.items() if size is not None},
    }


def _nearest(name: str) -> str:
    import difflib

    known = [known for known in timm.list_models() if "vit" in known or known.startswith("deit")]
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "see timm.list_models('*vit*')"
