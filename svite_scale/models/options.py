"""The model, what is sparse in it, and its teacher."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from svite_scale.errors import OptionError
from svite_scale.options import options, refuse_unused, whole_choice
from svite_scale.sparsity.options import UNIT_DROP_FRACTION, Allocation, Density, Fraction, MethodOptions

Size = Annotated[int | None, Field(ge=1)]
PositiveList = tuple[Annotated[float, Field(gt=0.0)], ...]


@options
class ModelConfig:
    """The dense timm model. A field that is null keeps what ``name`` says, and one that the model doesn't take is refused."""

    name: str = "deit_tiny_patch16_224"
    """timm's name of the model; ``timm.list_models()`` lists them, and docs/models.md says which train."""
    weights: str | None = None
    """The weights that a run starts from: a state dict of timm's model, ``.safetensors`` or ``.pth``, or an exported folder of
    the form timm, sliced or packed. Null draws them."""
    num_classes: Annotated[int, Field(ge=1)] = 1000
    """Outputs of the head. Every label of the data must be below."""
    image_size: Annotated[int, Field(ge=1)] = 224
    """Pixels, height and width alike."""
    in_channels: Annotated[Literal[1, 3], BeforeValidator(whole_choice)] = 3
    """Channels of the images: 3 for RGB, 1 for grey."""
    patch_size: Size = None
    """Pixels, height and width of a patch alike."""
    embed_dim: Size = None
    """Width: the features of a token."""
    depth: Size = None
    """Number of blocks."""
    num_heads: Size = None
    """Attention heads of each block."""
    init_gain: Annotated[float | None, Field(gt=0.0)] = None
    """First weights of the linear layers in the blocks: their standard deviation is init_gain / sqrt(inputs of the layer). Null
    keeps timm's, which is 0.02 in a ViT of any width."""
    drop_path: Annotated[float, Field(ge=0.0, le=0.99)] = 0.0
    """Stochastic depth rate of the last block; earlier blocks ramp up to it."""
    activation_checkpointing: bool = False
    """Keeps only the inputs of blocks for backward, and computes the rest again: less memory, more time."""

    def __post_init__(self) -> None:
        if self.weights is not None:
            refuse_unused(self, "init_gain", "isn't used where weights is given")


@options
class StructuredConfig:
    """Whole attention heads and MLP neurons (the paper's section 3.2, S2ViTE)."""

    heads: Density = 1.0
    """Fraction of the heads of each block that is active, rounded down; 1.0 keeps all."""
    neurons: Density = 1.0
    """The same of the hidden neurons of each block's MLP."""
    grow: Literal["candidate", "paper"] = "candidate"
    """Score of an absent head or neuron: ``candidate`` tries one with weights of its own; ``paper`` is the reference's."""
    drop_fraction: Annotated[float | None, Field(ge=0.0, le=1.0)] = UNIT_DROP_FRACTION
    """Fraction of the active heads and neurons dropped at an update, at the start, in expectation. It ends at
    ``sparsity.final_drop_fraction``, or stays where it starts if that is lower. Null drops as large a fraction of them as of
    the weights."""

    def __post_init__(self) -> None:
        if self.heads == self.neurons == 1.0:
            for name in ("grow", "drop_fraction"):
                refuse_unused(self, name, "isn't used where all heads and neurons are active")


@options
class TokensConfig:
    """The learnable token selector (the paper's section 3.3, SViTE+), given by one of ``keep`` and ``training_keep``."""

    keep: Annotated[float | None, Field(gt=0.0)] = None
    """Tokens that pass, class, distillation and register tokens among them: up to 1 a fraction of those that reach the
    selector, rounded half up; above 1 a count. Null has no selector."""
    training_keep: Annotated[float | None, Field(gt=0.0, lt=1.0)] = None
    """Instead of ``keep``: the fraction of the patch tokens that pass in training. The model itself, in evaluation and exports,
    has all tokens."""
    training_keep_until: Fraction = 0.9
    """Fraction of training after which all tokens pass in training too, with ``training_keep``."""
    signal: Literal["classifier", "paper", "random"] = "classifier"
    """Scores of the tokens: ``classifier`` is the attention of a small classifier in the selector, which learns from a loss of
    its own; ``paper`` is the reference's linear layer, which learns through the tokens' scale; ``random`` is a draw for each
    sample, for ``training_keep`` only."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """A selector stands before each of these blocks; 0 is after the embedding."""
    mode: Literal["gather", "mask"] = "gather"
    """``gather`` shortens the sequence; ``mask`` multiplies by zero instead, as the paper's code does, and saves nothing."""
    keep_warmup: Fraction = 0.0
    """Fraction of training in which the tokens that pass in training fall from all to ``keep``, by a cosine in 8 levels."""
    temperature: Annotated[float, Field(gt=0.0)] = 10.0
    """Temperature of the Gumbel softmax at the start of training, for ``signal: paper``."""
    final_temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """The same at the end of training; in between the temperature falls on a line, by optimizer step."""

    @property
    def has_selectors(self) -> bool:
        """Whether a model has token selectors, be it in training only."""
        return self.keep is not None or self.training_keep is not None

    def __post_init__(self) -> None:
        blocks = list(self.blocks)
        if not blocks or blocks != sorted(set(blocks)):
            problem = "doesn't name blocks in ascending order, each once"
            raise OptionError("blocks", blocks, problem, "use for example [0]")
        if self.final_temperature > self.temperature:
            problem = f"is above temperature ({self.temperature}), but the temperature falls"
            raise OptionError("final_temperature", self.final_temperature, problem, "lower it")
        if not self.has_selectors:
            for name in ("training_keep_until", "signal", "blocks", "mode", "keep_warmup", "temperature", "final_temperature"):
                refuse_unused(self, name, "isn't used where keep and training_keep are null")
        if self.keep is None:
            refuse_unused(self, "keep_warmup", "isn't used where keep is null")
        if self.training_keep is None:
            refuse_unused(self, "training_keep_until", "isn't used where training_keep is null")
        if self.signal != "paper":
            for name in ("temperature", "final_temperature"):
                refuse_unused(self, name, f"isn't used by the signal {self.signal}")
        if self.training_keep is not None:
            self._check_training_keep(self.training_keep)
        elif self.signal == "random":
            raise OptionError("signal", "random", "doesn't tell which tokens evaluation keeps", "use it with training_keep")
        if self.keep is not None and self.keep > 1:
            self._check_count(self.keep)

    def _check_training_keep(self, training_keep: float) -> None:
        """Refuses what doesn't fit tokens that are dropped in training only."""
        if self.keep is not None:
            problem = "drops tokens in training only, but keep drops them always"
            raise OptionError("training_keep", training_keep, problem, "leave one of them out")
        if self.signal == "paper":
            raise OptionError("signal", "paper", "is only for keep", "use random or classifier with training_keep")
        refuse_unused(self, "mode", "saves nothing, which is all that training_keep is for")

    def _check_count(self, keep: float) -> None:
        """Refuses a number of tokens that isn't one, or that several selectors can't keep."""
        if not keep.is_integer():
            remedy = "round it, or use a fraction of at most 1"
            raise OptionError("keep", keep, "is no whole number of tokens", remedy)
        if self.mode == "gather" and len(self.blocks) > 1:
            problem = f"is a count, which only the first of {len(self.blocks)} selectors would bring the tokens down to"
            raise OptionError("keep", keep, problem, "use a fraction, or one block in blocks")


@options
class SparseModelOptions(MethodOptions, Allocation):
    """The sparse parts of a model: heads and neurons, the weights of all other layers, and tokens."""

    structured: StructuredConfig = field(default_factory=StructuredConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)

    def __post_init__(self) -> None:
        Allocation.__post_init__(self)
        MethodOptions.__post_init__(self)

    @property
    def is_smaller(self) -> bool:
        """Whether heads, neurons or tokens are absent, so that the model is smaller than the dense one."""
        return self.structured.heads < 1.0 or self.structured.neurons < 1.0 or self.tokens.keep is not None


@options
class DistillationConfig:
    """Learning from another model's answers too (DeiT, arXiv:2012.12877, section 4)."""

    teacher: str | None = None
    """timm's name of the teacher; null is off."""
    checkpoint: str | None = None
    """Its weights: a local ``.safetensors``, or a ``.pth`` of a state dict."""
    kind: Literal["soft", "hard"] = "hard"
    """``soft`` compares with all that the teacher says, ``hard`` with its first guess."""
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The teacher's fraction of the loss; the labels have the rest."""
    temperature: Annotated[float, Field(gt=0.0)] = 3.0
    """Divides both models' logits, for ``kind: soft``."""
    mean: tuple[float, ...] | None = None
    """Per channel, for pixels in 0..1, as the teacher was trained; null is ``data.mean``."""
    std: PositiveList | None = None
    """Standard deviations, in the same way; null is ``data.std``."""

    def __post_init__(self) -> None:
        for name, other in (("teacher", "checkpoint"), ("checkpoint", "teacher"), ("mean", "std"), ("std", "mean")):
            given = getattr(self, other)
            if getattr(self, name) is None and given is not None:
                raise OptionError(name, None, f"is missing beside {other} ({given!r})", "give both or none")
        if self.kind == "hard":
            refuse_unused(self, "temperature", "isn't used by kind=hard")
