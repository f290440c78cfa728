"""The engine that moves the active weights during training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any
from weakref import finalize, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svite_scale.errors import TopologyError
from svite_scale.sparsity import bits
from svite_scale.sparsity.access import Annealed, ParameterAccess, TrackedTensors, auxiliary_classifiers
from svite_scale.sparsity.layers.base import SparseLayer, sparse_layers
from svite_scale.sparsity.layers.units import UnitLayer
from svite_scale.sparsity.options import TopologyOptions
from svite_scale.sparsity.sharding import own_chunk, sharded_tensors
from svite_scale.sparsity.topology.checks import check_state, check_stepped
from svite_scale.sparsity.topology.decision import decide, num_moved, write_topology
from svite_scale.sparsity.topology.growth import GrowthScores
from svite_scale.sparsity.topology.methods import Method, find_method
from svite_scale.sparsity.topology.schedule import UpdateSchedule
from svite_scale.sparsity.topology.statistics import LayerUpdate, Statistics, TopologyUpdate
from svite_scale.sparsity.topology.warmup import GrownWarmup
from svite_scale.sparsity.transition import TopologyTransition

logger = logging.getLogger("svite_scale")


class TopologyEngine:
    """Prunes and grows the sparse layers of a model on a schedule (Algorithm 1 of the SViTE paper).

    An update follows an optimizer step. In each layer it drops the active weights of the smallest score, and grows as many
    inactive ones of the largest: by default of the smallest magnitude, and of the largest gradient, averaged over ranks,
    micro-batches and the growth window. The number of active weights of a layer never changes, so neither does any shape. A
    weight that is dropped and grown by one update keeps its value and moments; other grown weights start at 0.

    A layer whose values are frozen, on all ranks or on none, keeps its topology, and no gradient of it is needed. Once thawed,
    it changes again at the first update in whose whole growth window it wasn't frozen.

    A layer has one engine at a time: until :meth:`detach`, or until nothing refers to the engine any more.

    Attributes:
        layers: the sparse layers, by their names in the model, without what engines' wrappers add to names.
        annealed: modules that each step anneals: token selectors.
        classifiers: modules that learn from a loss of their own: the classifiers of token selectors.
        steps: optimizer steps so far.
        last_update: the step after which weights last moved; 0 before the first time.
        postponed: updates that were postponed or left out, because a gradient wasn't finite or the step not applied.
        growth: the gradients recorded in a growth window.
        statistics: the history of the weights, and which ones the last update grew.
    """

    def __init__(
        self,
        model: nn.Module,
        access: ParameterAccess,
        schedule: UpdateSchedule,
        options: TopologyOptions | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Builds the engine after the model is wrapped. A collective.

        Args:
            model: holds sparse layers; wrapped by an engine or not.
            access: reads and writes the wrapped model's parameters.
            schedule: when weights move, and how many.
            options: which weights move, and how they start.
            group: the data-parallel ranks; None where ``torch.distributed`` isn't in use.

        Raises:
            TopologyError: two layers have one name.
            OptionError: the method can't be imported, or a window reaches from one update to the next.
        """
        self.layers = sparse_layers(model)
        self.annealed = [module for module in model.modules() if isinstance(module, Annealed)]
        self.classifiers = auxiliary_classifiers(model)
        self.access = access
        self.schedule = schedule
        self.options = options or TopologyOptions()
        self.method = find_method(self.options.method)
        self.options.refuse_long_windows(schedule.update_every)
        self.steps = self.last_update = self.postponed = 0
        self._retry_step = 0
        self._state_checked = False  # since the first step, at which optimizers make it
        self._tracked: list[TrackedTensors] = []
        for name, layer in self.layers.items():
            layer.name = name
        self.growth = GrowthScores(self.layers.values(), group, by=self.options.grow_by)
        self.statistics = Statistics(group)
        warmup_steps = self.options.grown_warmup_steps
        self.warmup = GrownWarmup(self.layers.values(), access, warmup_steps) if warmup_steps else None
        for layer in self.layers.values():
            self.statistics.add(layer, access.read(layer.mask))
        # Last, so that an engine that couldn't be built has no layer.
        own = ref(self)
        for layer in self.layers.values():
            layer.engine = own
        self._detach = finalize(self, _release, self.growth, self.warmup, own)
        self._detach.atexit = False
        self._prepare_step()
        self._check_state()
        if self._moves and not schedule.num_updates:
            logger.warning(
                "no weight will ever move: updates come every %d steps from step %d on, and stop after step %d of %d; lower "
                "update_every, or use method static",
                schedule.update_every,
                schedule.start_step,
                schedule.stop_step,
                schedule.total_steps,
            )

    @property
    def drop_fraction(self) -> float:
        """Fraction of the active weights that an update now would drop and grow; 0 where no weight moves any more."""
        return self.schedule.drop_fraction_at(self.steps) if self._may_move_now else 0.0

    @property
    def unit_drop_fraction(self) -> float:
        """The same of the heads and neurons."""
        return self.schedule.unit_drop_fraction_at(self.steps) if self._may_move_now else 0.0

    @property
    def next_update(self) -> int | None:
        """Optimizer step after which weights move next; None if they don't any more."""
        if not self._moves:
            return None
        if self.steps < self._retry_step:
            return self._retry_step if self._retry_step <= self.schedule.stop_step else None
        # After a postponed update, scheduled ones may come too soon for a whole window, or within the warm-up.
        room = max(self.options.grow_window, self.options.grown_warmup_steps)
        return self.schedule.next_update(max(self.steps, self.last_update + room - 1))

    def detach(self) -> None:
        """Releases the layers: their topology stays as it is, and another engine may have them."""
        self._detach()

    def track(self, tensors: TrackedTensors) -> None:
        """Has tensors beside the weights, such as an average of them, follow the topology from now on. On all ranks alike."""
        self._tracked.append(tensors)

    def zero_grad(self) -> None:
        """Forgets the gradients recorded since the last :meth:`step`. Call it where ``optimizer.zero_grad()`` is called without
        a step before it: after a backward that isn't for training, or after an error. On all ranks alike.
        """
        self.growth.discard_step()

    def step(self, *, applied: bool = True) -> TopologyUpdate | None:
        """Counts one optimizer step, and updates the topology if an update is due. Call it right after each optimizer step.

        A collective on update steps: all ranks call it. The update is postponed by another growth window if the window holds a
        gradient that isn't finite, or if the step on which the update is due wasn't applied; :attr:`postponed` counts it. It is
        left out if the schedule's last step would pass. A scheduled update is left out too if it would come less than a growth
        window, or a warm-up, after a postponed one.

        Args:
            applied: False for a step that left the weights as they were; its gradients don't count, finite or not. The same
                on all ranks.

        Returns:
            A summary of the update; None where there was none.

        Raises:
            TopologyError: a weight is NaN, no gradient reached a layer that isn't frozen, the optimizer doesn't step a layer
                that was thawed, or it keeps state that can't follow moving weights (found at the first step already); the
                message names the layer. Or nobody computed the loss of token selectors that learn from one. Or the engine was
                detached.
        """
        if not self._detach.alive:
            raise TopologyError("this topology engine was detached; attach another one, and call its step()")
        for classifier in self.classifiers:
            classifier.end_step()
        self.access.reshard()
        if applied and not self._state_checked:
            self._check_state()
            self._state_checked = True
        due = self.next_update == self.steps + 1
        self.steps += 1
        self.growth.end_step(applied=applied)
        update = self._try_update(applied) if due else None
        self._prepare_step()
        return update

    @torch.no_grad()
    def unit_masks(self) -> dict[str, bytes]:
        """Returns the masks of layers of heads or neurons, by name: ``ceil(N / 8)`` bytes; bit i of byte j is unit 8j + i.

        The masks of weights and of blocks are left out, because they are large. A collective.
        """
        layers = {name: layer for name, layer in self.layers.items() if isinstance(layer, UnitLayer)}
        return {name: self.access.read(layer.mask).cpu().numpy().tobytes() for name, layer in layers.items()}

    def counters(self) -> dict[str, Any]:
        """Returns the part of :meth:`state_dict` that isn't tensors: plain numbers, the names of frozen layers, and what
        candidates are drawn by, for each layer of heads or neurons. Local.
        """
        units = {name: layer for name, layer in self.layers.items() if isinstance(layer, UnitLayer)}
        return {
            "steps": self.steps,
            "last_update": self.last_update,
            "postponed": self.postponed,
            "retry_step": self._retry_step,
            "recorded_steps": self.growth.recorded_steps,
            "recorded_ranks": self.growth.world_size,
            "frozen": sorted(self.growth.frozen),
            "candidates": {name: {"seed": layer.seed, "std": layer.candidate_std} for name, layer in units.items()},
        }

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Returns what :meth:`load_state_dict` needs to resume exactly here, on any number of ranks. Local.

        ``torch.distributed.checkpoint`` calls it to save and to load. The tensors are the engine's own, not copies.

        Returns:
            :meth:`counters` under ``counters``. By layer name under ``history`` uint8 ``[ceil(N / 8)]``, and under
            ``recently_grown`` uint8 ``[ceil(k / 8)]``. With a growth window of several steps also ``growth``, fp32: the sums of
            the recorded gradients, and zeros between two windows, because a loaded tensor must have the form of the saved one.
            With a process group the tensors are ``DTensor``s, ``Shard(0)``.
        """
        layers, group = self.layers.items(), self.growth.group
        held = self.statistics
        history = {name: (held.history[name], bits.num_bytes(layer.shape.numel())) for name, layer in layers}
        grown = {name: (held.recently_grown[name], bits.num_bytes(layer.num_active)) for name, layer in layers}
        # A window of one step holds nothing once that step is done.
        keeps_sums = self._moves and self.options.grow_window > 1
        growth = {name: (self.growth.chunk(layer), layer.growth_numel) for name, layer in layers if keeps_sums}
        return {
            "counters": self.counters(),
            "history": sharded_tensors(history, group),
            "recently_grown": sharded_tensors(grown, group),
            "growth": sharded_tensors(growth, group),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from what :meth:`state_dict` returned, on this or another number of ranks. A collective.

        Args:
            state: its tensors are whole, or ``DTensor``s over the ranks that there are now. ``growth`` is read within a window
                only, of the layers that weren't frozen; the others may be left out.

        Raises:
            TopologyError: the state is of another model, or of another growth window. The message names a tensor.
        """
        self.access.reshard()
        counters = state["counters"]
        recorded = self.layers.keys() - counters["frozen"] if counters["recorded_steps"] else set()
        here = self.state_dict()
        for kind, names in (("history", set(self.layers)), ("recently_grown", set(self.layers)), ("growth", recorded)):
            _check_same_shapes(kind, names, here[kind], state[kind])
        self.steps, self.last_update = counters["steps"], counters["last_update"]
        self.postponed, self._retry_step = counters["postponed"], counters["retry_step"]
        group = self.growth.group
        for name, layer in self.layers.items():
            candidates = counters.get("candidates", {}).get(name)  # older checkpoints have none
            if isinstance(layer, UnitLayer) and candidates:
                layer.seed, layer.candidate_std = candidates["seed"], candidates["std"]
            device = layer.mask.device
            self.statistics.history[name] = own_chunk(state["history"][name], group).to(device)
            self.statistics.recently_grown[name] = own_chunk(state["recently_grown"][name], group).to(device)
            if self.warmup and not layer.is_frozen:
                self.warmup.start(layer, self.statistics.read_grown(layer))
        sums = {name: own_chunk(state["growth"][name], group) for name in self.layers if name in recorded}
        self.growth.load(sums, counters["recorded_steps"], counters["recorded_ranks"], set(counters["frozen"]))
        self._prepare_step()

    @property
    def _moves(self) -> bool:
        return bool(self.layers) and self.method is not None

    @property
    def _may_move_now(self) -> bool:
        return self._moves and self.steps <= self.schedule.stop_step

    def _prepare_step(self) -> None:
        """Records gradients during the next step if it lies in a growth window, and anneals token selectors."""
        for module in self.annealed:
            module.anneal(min(self.steps / self.schedule.total_steps, 1.0))
        due = self.next_update
        if due is not None and due - self.steps <= self.options.grow_window:
            self.growth.start_recording(due)
        else:
            self.growth.stop_recording()
        if self.warmup:
            self.warmup.prepare(self.steps - self.last_update)

    def _try_update(self, applied: bool) -> TopologyUpdate | None:
        update = None
        if applied:
            self.growth.check_complete()
        if not applied:
            self._postpone("the optimizer's step wasn't applied")
        elif not self.growth.all_finite():
            self._postpone("a gradient of the growth window isn't finite")
        else:
            assert self.method is not None, "only methods that move weights have updates"
            update = self._update(self.method)
        self.growth.clear()
        return update

    def _postpone(self, reason: str) -> None:
        self.postponed += 1
        self._retry_step = self.steps + self.options.grow_window
        allowed = self._retry_step <= self.schedule.stop_step
        outcome = (
            f"postponed to step {self._retry_step}" if allowed else "left out, for its next window would end past the stop"
        )
        logger.warning("%s, so the topology update after step %d is %s", reason, self.steps, outcome)

    @torch.no_grad()
    def _update(self, method: Method) -> TopologyUpdate:
        frozen = self.growth.frozen
        moving = [layer for name, layer in self.layers.items() if name not in frozen]
        for layer in moving:
            check_stepped(layer.name, layer, self.access, "give it what is thawed later too, or add_param_group() when thawing")
        check_state(moving, self.access, self.options, stepped=True)
        self.last_update = self.steps
        layers = {
            name: self._keep_layer(layer) if name in frozen else self._update_layer(layer, method)
            for name, layer in self.layers.items()
        }
        for name, (ever_active, initial_survivors) in self.statistics.count_history().items():
            layers[name] = replace(layers[name], ever_active=ever_active, initial_survivors=initial_survivors)
        return TopologyUpdate(self.steps, self.drop_fraction, layers, self.unit_masks())

    def _check_state(self) -> None:
        """Refuses an optimizer whose state can't follow moving weights, as soon as that can be known."""
        if self._moves:
            check_state(self.layers.values(), self.access, self.options, stepped=False)

    def _update_layer(self, layer: SparseLayer, method: Method) -> LayerUpdate:
        """Updates one layer; its dense tensors live only in here."""
        drop_fraction = self.unit_drop_fraction if isinstance(layer, UnitLayer) else self.drop_fraction
        count = num_moved(layer, drop_fraction, self.steps, self.options.seed)
        protected = self.statistics.read_grown(layer) if self.options.protect_grown else None
        decision = decide(layer, method, count, self.steps, self.options, self.access, self.growth, protected)
        transition = TopologyTransition(decision.old_mask, decision.new_mask, layer.shape, layer.num_active)
        write_topology(layer, transition, self.access, self.options, self._tracked)
        grown_survival = self.statistics.apply(layer, transition)
        if self.warmup:
            self.warmup.start(layer, ~transition.kept)
        return LayerUpdate(
            unit=layer.unit,
            numel=layer.shape.numel(),
            num_active=layer.num_active,
            drop_fraction=drop_fraction,
            dropped=decision.count,
            regrown=decision.count - int((~transition.kept).count_nonzero()),
            grown_survival=grown_survival,
            drop_threshold=decision.drop_threshold,
            grow_threshold=decision.grow_threshold,
        )

    def _keep_layer(self, layer: SparseLayer) -> LayerUpdate:
        """Leaves a frozen layer as it is at an update."""
        self.statistics.keep(layer, self.access.read(layer.mask))
        return LayerUpdate(unit=layer.unit, numel=layer.shape.numel(), num_active=layer.num_active)


def _check_same_shapes(kind: str, names: Set[str], here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuses saved tensors that aren't those of the named layers."""
    for name in sorted(names | (saved.keys() - here.keys())):
        shapes = [tuple(tensors[name].shape) if name in tensors else "not there" for tensors in (saved, here)]
        if shapes[0] != shapes[1]:
            raise TopologyError(
                f"{kind} of {name} is {shapes[0]} in the saved topology and {shapes[1]} here; load it with the same model "
                "and grow_window as it was saved with"
            )


def _release(growth: GrowthScores, warmup: GrownWarmup | None, engine: ref[TopologyEngine]) -> None:
    for layer in growth.layers:
        if layer.engine is engine:
            layer.engine = layer.gradient_hook = None
    if warmup:
        warmup.remove()
