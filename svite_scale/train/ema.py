"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.engines.torch_access import reshard
from svite_scale.errors import TopologyError
from svite_scale.sparsity.module_names import unwrapped
from svite_scale.sparsity.topology.engine import TopologyEngine


class Ema:
    """A moving average of the weights: ``average = decay * average + (1 - decay) * weight`` after each optimizer step.

    The formula is that of timm's ``ModelEmaV3``. The average is sharded as the engine shards the fp32 values: each rank keeps
    the average of the values that it steps, so :meth:`update` needs no collective. The average moves with the topology as the
    values do: a dropped weight loses its average, the average of a grown weight begins with the weight, and a regrown weight
    keeps its average. So :meth:`update` may be called before or after ``topology.step()``.

    Floating-point buffers that the model saves, such as the statistics of BatchNorm, are averaged too. Each rank averages its
    own buffers.

    Attributes:
        decay: the factor in the formula.
        parts: this rank's part of each trainable parameter's average, as ``access.local_values`` cuts the parameter.
        buffers: the averages of the buffers, fp32, by name.
    """

    def __init__(self, model: nn.Module, topology: TopologyEngine, decay: float = 0.9999) -> None:
        """Begins with the model's weights. Local.

        Args:
            model: the model, after an engine has wrapped it; either the module before wrapping or the engine's module.
            topology: the engine that prunes and grows the model's weights.
            decay: the factor in the formula, in [0, 1].

        Raises:
            ValueError: the decay isn't a number in [0, 1].
            TopologyError: the optimizer steps weights that aren't fp32, which are too coarse to be averaged.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay ({decay!r}) must be a number in [0, 1]")
        self.decay = decay
        self._model, self._access = unwrapped(model), topology.access
        self._names = {parameter: name for name, parameter in self._named_trainable()}
        self.parts = {parameter: self._values(parameter).clone() for parameter in self._names}
        for parameter, part in self.parts.items():
            if part.dtype not in (torch.float32, torch.float64):
                raise TopologyError(
                    f"{self._names[parameter]} is stepped in {part.dtype}, too coarse to be averaged; keep weights in fp32 and "
                    "compute under torch.autocast, or in the mixed precision of FSDP2 or DeepSpeed"
                )
        saved = self._model.state_dict(keep_vars=True).keys()
        self.buffers = {
            name: buffer.float().clone()
            for name, buffer in self._model.named_buffers()
            if name in saved and buffer.is_floating_point()
        }
        self._in_place = False
        topology.track(self)

    @torch.no_grad()
    def update(self) -> None:
        """Updates the averages after an optimizer step. Local.

        Raises:
            TopologyError: the averages are in the place of the weights, or a parameter became trainable after this was made.
        """
        self._check_not_swapped()
        for name, parameter in self._named_trainable():
            self._check_known(parameter, name)
        values = [self._values(parameter) for parameter in self.parts]
        torch._foreach_lerp_(list(self.parts.values()), values, 1.0 - self.decay)
        for name, average in self.buffers.items():
            average.lerp_(self._model.get_buffer(name).float(), 1.0 - self.decay)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """Returns the full average of one parameter on every rank, fp32, in the parameter's shape. A collective.

        Raises:
            TopologyError: the parameter became trainable after this was made.
        """
        self._check_known(parameter, "a weight")
        # The engine gathers values, so the average takes their place for a moment.
        self._exchange(parameter)
        average = self._access.read(parameter).clone()
        self._exchange(parameter)
        return average

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Replaces the average of one parameter by a full one, as :meth:`read` returns it. Local."""
        _, offset = self._access.local_values(parameter)
        part = self.parts[parameter]
        own = average.flatten()[offset : offset + part.numel()]
        part[: own.numel()].copy_(own)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Returns the full averages, fp32, on the CPU of every rank, by the names of the model's parameters and buffers.

        They can be loaded under any engine on any number of ranks. They belong to the masks of the same step. A collective: all
        ranks call it.
        """
        self._check_not_swapped()
        averages = {name: self.read(parameter).cpu() for parameter, name in self._names.items()}
        return averages | {name: average.cpu().clone() for name, average in self.buffers.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what :meth:`state_dict` returned. A collective: all ranks call it.

        Raises:
            TopologyError: the state is of another model; the message names what is missing, unknown, or of another shape.
        """
        self._check_not_swapped()
        shapes = {name: self.read(parameter).shape for parameter, name in self._names.items()}
        shapes |= {name: average.shape for name, average in self.buffers.items()}
        for name in shapes.keys() ^ state.keys():
            problem = "has no average of" if name in shapes else "has an average that the model has no weight for:"
            raise TopologyError(f"the state {problem} {name}; load what Ema saved of this model")
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise TopologyError(f"the average {name} is {tuple(state[name].shape)}, but the model's is {tuple(shape)}")
        for parameter, name in self._names.items():
            self.write(parameter, state[name].to(self.parts[parameter].device))
        for name, average in self.buffers.items():
            average.copy_(state[name])

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Exchanges weights and averages within the context; after it the weights are the same as before, bit for bit.

        Within the context the model computes with the averages, and the weights lie in the memory of the averages, so nothing
        may be saved or stepped. A collective, one parameter at a time.

        Raises:
            TopologyError: the averages are in the place of the weights already.
        """
        self._check_not_swapped()
        buffers = {name: self._model.get_buffer(name).clone() for name in self.buffers}
        self._swap(self.buffers)
        self._in_place = True
        try:
            yield
        except BaseException:
            # After an error on one of several ranks, the others may never call the collectives of a restore.
            if not dist.is_initialized() or dist.get_world_size() == 1:
                self._restore(buffers)
            raise
        self._restore(buffers)

    def _restore(self, buffers: Mapping[str, Tensor]) -> None:
        self._swap(buffers)
        self._in_place = False

    @torch.no_grad()
    def _swap(self, buffers: Mapping[str, Tensor]) -> None:
        reshard(self._model)
        for parameter in self.parts:
            self._exchange(parameter)
            # The forward pass computes with a copy, which is updated only by a write.
            self._access.write(parameter, self._access.read(parameter).clone())
        for name, buffer in buffers.items():
            self._model.get_buffer(name).copy_(buffer)

    @torch.no_grad()
    def _exchange(self, parameter: nn.Parameter) -> None:
        values, part = self._values(parameter), self.parts[parameter]
        held = values.clone()
        values.copy_(part)
        part.copy_(held)

    def _values(self, parameter: nn.Parameter) -> Tensor:
        return self._access.local_values(parameter)[0]

    def _check_not_swapped(self) -> None:
        if self._in_place:
            raise TopologyError(
                "the averages are in the place of the weights; leave in_place_of_weights() first, or, where an error "
                "on some rank left it, resume from a checkpoint"
            )

    def _check_known(self, parameter: nn.Parameter, name: str) -> None:
        if parameter not in self.parts:
            raise TopologyError(f"{name} became trainable after Ema was made, so it has no average; make Ema after thawing")

    def _named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        reshard(self._model)
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)
