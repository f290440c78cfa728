"""The exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from svite_scale.engines.torch_access import reshard
from svite_scale.errors import TopologyError
from svite_scale.sparsity.module_names import is_of_deepspeed
from svite_scale.sparsity.topology.engine import TopologyEngine


class Ema:
    """average = decay * average + (1 - decay) * weight, after each optimizer step, as timm's ``ModelEmaV3`` has it.

    Sharded as the engine shards the fp32 values: each rank keeps the average of those it steps, so :meth:`update` needs no
    collective. It follows the topology as values do: the average of a dropped weight vanishes, a grown weight's begins with the
    weight itself, a regrown weight's goes on. So it may be updated before or after ``topology.step()``.

    Floating-point buffers that the model saves, such as the statistics of BatchNorm, are averaged too, each rank its own.

    Attributes:
        decay: see above.
        parts: by trainable parameter, this rank's part, as ``access.local_values`` cuts it.
        buffers: by name, the averages of buffers, fp32.
    """

    def __init__(self, model: nn.Module, topology: TopologyEngine, decay: float = 0.9999) -> None:
        """Begins with the model's weights, and follows the topology from now on. Local.

        Args:
            model: as an engine wrapped it, or as it was before; wrapped by now.
            topology: what moves its weights.
            decay: see the class; in [0, 1].

        Raises:
            ValueError: the decay isn't a number in [0, 1].
            TopologyError: weights that the optimizer steps are too coarse to be averaged: not fp32.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay ({decay!r}) must be a number in [0, 1]")
        self.decay = decay
        self._model, self._access = _unwrapped(model), topology.access
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
        """One optimizer step is done. Local.

        Raises:
            TopologyError: the averages are in the place of the weights, or a parameter became trainable meanwhile.
        """
        self._check_not_swapped()
        for name, parameter in self._named_trainable():
            self._check_known(parameter, name)
        values = [self._values(parameter) for parameter in self.parts]
        torch._foreach_lerp_(list(self.parts.values()), values, 1.0 - self.decay)
        for name, average in self.buffers.items():
            average.lerp_(self._model.get_buffer(name).float(), 1.0 - self.decay)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The full average of one parameter, fp32, shaped like it, on every rank. A collective.

        Raises:
            TopologyError: it became trainable after this was made.
        """
        self._check_known(parameter, "a weight")
        # Put in the place of the values for a moment, the engine gathers it as it gathers these.
        self._exchange(parameter)
        average = self._access.read(parameter).clone()
        self._exchange(parameter)
        return average

    def write(self, parameter: nn.Parameter, average: Tensor) -> None:
        """Replaces what :meth:`read` returned. Local."""
        _, offset = self._access.local_values(parameter)
        part = self.parts[parameter]
        own = average.flatten()[offset : offset + part.numel()]
        part[: own.numel()].copy_(own)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The full averages by the names of the model's parameters and buffers, fp32, on the CPU of every rank: for any engine
        and number of ranks. They belong to the masks of the same step. A collective.
        """
        self._check_not_swapped()
        averages = {name: self.read(parameter).cpu() for parameter, name in self._names.items()}
        return averages | {name: average.cpu().clone() for name, average in self.buffers.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on with what :meth:`state_dict` returned. A collective.

        Raises:
            TopologyError: it is of another model; names what is missing, unknown, or of another shape.
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
        """Within it, the model computes with the average; afterwards, with the weights as they were, bit by bit.

        A collective, one parameter at a time. The weights meanwhile take the memory of the average, so nothing may be saved or
        stepped.

        Raises:
            TopologyError: the averages are in their place already.
        """
        self._check_not_swapped()
        buffers = {name: self._model.get_buffer(name).clone() for name in self.buffers}
        self._swap(self.buffers)
        self._in_place = True
        try:
            yield
        except BaseException:
            # After an error on one of several ranks, none could rely on the others to come to the collectives.
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
            # What forward computes with follows the fp32 values only when they are written.
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
                "on some rank left it, go on from a checkpoint"
            )

    def _check_known(self, parameter: nn.Parameter, name: str) -> None:
        if parameter not in self.parts:
            raise TopologyError(f"{name} became trainable after Ema was made, so it has no average; make Ema after thawing")

    def _named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        reshard(self._model)
        return ((name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad)


def _unwrapped(model: Any) -> nn.Module:
    """The model that the user built, so that its names are the same on every engine."""
    while isinstance(model, DistributedDataParallel) or is_of_deepspeed(model):
        model = model.module
    return getattr(model, "_orig_mod", model)  # of torch.compile
