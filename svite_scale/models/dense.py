"""A dense model of timm's, and whether a run can train it."""

from __future__ import annotations

import difflib
import math
from copy import deepcopy
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from svite_scale.errors import ConfigError
from svite_scale.models.matrix_products import matrix_products
from svite_scale.models.options import ModelConfig
from svite_scale.models.token_selector import TokenSelector
from svite_scale.sparsity.layers.base import SparseLayer
from svite_scale.sparsity.packing import PACKED_TYPE

FIELDS = {
    "num_classes": "num_classes",
    "img_size": "image_size",
    "in_chans": "in_channels",
    "drop_path_rate": "drop_path",
    "patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
}
"""By timm's name of an option, the config's field of it."""

LEFT_OUT = {"img_size": None, "drop_path_rate": 0.0}
"""Options that a model needn't take, with the value at which that changes nothing; None is any value."""

REMEDY = "use another model, or leave out some of the sizes"


def build_dense(config: ModelConfig) -> nn.Module:
    """Returns the dense model, randomly initialised from torch's global generator, on torch's default device.

    Raises:
        ConfigError: timm has no such model, a run can't train it, or the sizes don't fit together.
    """
    options, _ = check_model(config)
    model = create("model.name", config.name, options, REMEDY)
    if config.init_gain is not None:
        draw_linear_layers(model, config.init_gain)
    if config.activation_checkpointing:
        cast(Any, model).set_grad_checkpointing(True)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that engines gather one at a time, such as transformer blocks.

    A block is an item of a ModuleList or Sequential and has several Linear or Conv2d layers. The list must hold more than one
    such item, or nothing else but token selectors. Of lists within lists, only the innermost ones count.
    """
    inner = [item for child in model.children() for item in blocks(child)]
    if inner or not isinstance(model, (nn.ModuleList, nn.Sequential)):
        return inner
    items = [item for item in model if _has_layers(item)]
    others = [item for item in model if not (_has_layers(item) or isinstance(item, TokenSelector))]
    return items if len(items) > 1 or not others else []


def draw_linear_layers(model: nn.Module, gain: float) -> None:
    """Draws the weights of :func:`linear_layers` again, with standard deviation ``gain / sqrt(inputs)``, from torch's global
    generator. Weights that are all zeros stay, because they make a layer start without effect.
    """
    for layer in linear_layers(model):
        if layer.weight.any():
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Returns the dense linear layers in the model's blocks: of a ViT, those of attention and MLP."""
    return [layer for block in blocks(model) for layer in block.modules() if type(layer) is nn.Linear]


def _has_layers(item: nn.Module) -> bool:
    """Returns whether a module has several layers, dense or sparse, and is no list."""
    if isinstance(item, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return False
    return sum(type(module) in PACKED_TYPE or isinstance(module, SparseLayer) for module in item.modules()) > 1


@cache
def check_model(config: ModelConfig) -> tuple[dict[str, Any], nn.Module]:
    """Checks that a run can train the model and that its sizes fit, on the meta device, once for each config.

    Returns:
        The options that timm is asked for: those of the config's fields that the model takes. And the model on the meta device;
        a copy of it may be changed.

    Raises:
        ConfigError: names the field and the remedy.
    """
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=1)
        remedy = f"did you mean {near[0]}?" if near else "see timm.list_models()"
        raise ConfigError("model.name", config.name, "is no model that timm knows", remedy)
    with torch.device("meta"):
        options, model = _create_with_options(config)
    _check_sizes(config, model)
    _check_layers(config.name, model)
    if config.init_gain is not None and not linear_layers(model):
        problem = f"draws the linear layers of blocks, but {config.name} has none"
        raise ConfigError("model.init_gain", config.init_gain, problem, "leave it null")
    forwarded = deepcopy(model)  # counting freezes the model that it counts
    _check_products(config, forwarded)
    if config.activation_checkpointing:
        _check_checkpointing(config.name, forwarded)
    return options, model


def _create_with_options(config: ModelConfig) -> tuple[dict[str, Any], nn.Module]:
    """Creates the model of a config.

    Returns:
        The config's fields that the model takes, by timm's names, without those that are None; and the model.

    Raises:
        ConfigError: a field is given that the model doesn't take, or the sizes don't fit together.
    """
    options = {option: getattr(config, field) for option, field in FIELDS.items() if getattr(config, field) is not None}
    while True:
        try:
            return options, create("model.name", config.name, options, REMEDY)
        except ConfigError as error:
            cause = error.__cause__ if isinstance(error.__cause__, TypeError) else ""
            # The error of an option that the model doesn't take quotes it.
            untaken = next((option for option in options if f"'{option}'" in str(cause)), None)
            if untaken is None:
                _check_sizes(config, create("model.name", config.name, {}, "use another model"))
                raise
        value = options.pop(untaken)
        if untaken not in LEFT_OUT or LEFT_OUT[untaken] not in (None, value):
            raise ConfigError(f"model.{FIELDS[untaken]}", value, f"isn't taken by {config.name}", "leave it out")


def _check_sizes(config: ModelConfig, model: Any) -> None:
    """Refuses sizes that don't fit together. timm would give no reason, or would train on parts of the images.

    Args:
        config: the sizes to check.
        model: built with these sizes; or with its own sizes, if timm can't build it with these.
    """
    if isinstance(getattr(model, "patch_embed", None), PatchEmbed):
        patch_size = config.patch_size or model.patch_embed.patch_size[0]
        if config.image_size % patch_size:
            problem = f"is not divisible by the patch size ({patch_size})"
            raise ConfigError("model.image_size", config.image_size, problem, "use a multiple")
    if isinstance(model, VisionTransformer) and hasattr(model.blocks[0], "attn"):
        embed_dim, num_heads = config.embed_dim or model.embed_dim, config.num_heads or model.blocks[0].attn.num_heads
        if embed_dim % num_heads:
            problem = f"does not divide model.embed_dim ({embed_dim})"
            raise ConfigError("model.num_heads", num_heads, problem, "use a divisor of it")


def _check_layers(name: str, model: nn.Module) -> None:
    """Refuses what a run can't train, or can't make sparse."""
    places: dict[nn.Module, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind, problem = type(module).__name__, None
        place = places.setdefault(module, path)
        if isinstance(module, _BatchNorm):
            problem = f"normalises by the batch ({path} is a {kind}), whose running statistics a run neither averages nor saves"
        elif isinstance(module, (nn.Linear, _ConvNd, nn.RNNBase)) and type(module) not in PACKED_TYPE:
            problem = f"isn't made of nn.Linear and nn.Conv2d alone ({path} is a {kind}), and others can't be sparse"
        elif type(module) in PACKED_TYPE and place != path:
            problem = f"has one layer in two places ({place} and {path}), which can't be sharded block by block"
        if problem is not None:
            remedy = "use another model, such as convnext_tiny, or svite_scale.sparsify in a loop of your own"
            raise ConfigError("model.name", name, problem, remedy)


def _check_products(config: ModelConfig, model: nn.Module) -> None:
    """Refuses a model that doesn't take images of this size, whose answer isn't one number per class, or that never applies a
    layer.
    """
    try:
        products = matrix_products(model, config.image_size, config.in_channels)
    except Exception as error:  # whatever a model raises
        known = timm.get_pretrained_cfg(config.name)
        size = "another" if known is None else f"another, such as {known.input_size[-1]}"
        problem = f"{config.name} can't take such images ({str(error) or type(error).__name__})"
        raise ConfigError("model.image_size", config.image_size, problem, f"use {size}") from error
    shape = getattr(products.output, "shape", None)
    if shape != (1, config.num_classes):
        raise ConfigError("model.name", config.name, "gives no logits, one number per class", "use a model that classifies")
    for layer, applications in products.applications.items():
        if not applications:
            problem = f"has a layer that its forward never applies, and so could never train ({layer})"
            raise ConfigError("model.name", config.name, problem, "use another model")


def _check_checkpointing(name: str, model: Any) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:
        raise ConfigError("model.activation_checkpointing", True, f"isn't supported by {name}", "set it to false") from error


def create(field: str, name: str, options: dict[str, Any], remedy: str) -> nn.Module:
    """A model of timm, without its weights.

    Raises:
        ConfigError: ``field`` names a model that timm can't build so.
    """
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=False, **options))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        sizes = ", ".join(f"{option}={value}" for option, value in options.items())
        problem = f"can't be built with {sizes or 'its own sizes'} ({str(error) or type(error).__name__})"
        raise ConfigError(field, name, problem, remedy) from error
