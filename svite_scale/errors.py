"""The exceptions that svite_scale raises for mistakes a user can mend.

Each message names what is wrong (a config field, a layer, a shard), the value found, and what to do about it.
Programmer's mistakes stay ``AssertionError``, ``TypeError`` and ``ValueError``.
"""

from __future__ import annotations


class SviteScaleError(Exception):
    """Base of all errors that this package raises for a user's mistake."""


class FieldError(SviteScaleError):
    """A named value can't be used.

    Args:
        field: what the value was given as.
        value: the value found, shown as written.
        problem: what is wrong with it, as the rest of a sentence.
        remedy: what to write instead.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{field} = {value!r}: {problem}; {remedy}")
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy


class OptionError(FieldError, ValueError):
    """An option or argument, by its name (``grow_window``), has a value that can't be used. A ValueError too."""


class ConfigError(FieldError):
    """A config field, by its dotted name (``sparsity.density``), has a value that the run can't use."""


class SparsifyError(OptionError):
    """An argument of ``sparsify``, by its name (``densities``), doesn't fit the model."""


class TopologyError(SviteScaleError):
    """Sparse layers can't be built or updated: a score is NaN, a count doesn't fit, a weight is shared."""


class MaskError(TopologyError, RuntimeError):
    """A mask's bits are computed with, as averages of weights do. A RuntimeError too, as torch raises for bytes."""


class DataError(SviteScaleError):
    """A shard, its index or a sample in it can't be read or written."""


class CheckpointError(SviteScaleError):
    """A checkpoint can't be written, found, or loaded into this run."""


class DivergedError(SviteScaleError):
    """Training has gone wrong for good: gradients aren't finite, or the loss spikes again and again. The same on all ranks."""


class RunError(SviteScaleError):
    """A run directory holds no run, or one of its files can't be read or written."""


class ExportError(SviteScaleError):
    """A model can't be exported, or an exported folder can't be written or read."""
