"""What the shipped configs cost, beside what the paper says of theirs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from svite_scale.config.load import read_config
from svite_scale.config.validate import validate
from svite_scale.cost.flops import count_flops

PUBLISHED = {"deit_tiny_s30": ("25.56%", "4.02"), "deit_small_t95_s50": ("49.32%", "-")}
"""The paper's figures (arXiv:2106.04533), by name of the config: the saved multiply-accumulates, and millions of parameters."""


def paper_table(configs: Iterable[Path]) -> str:
    """Returns a table with one row per config file. ``multiplied`` are the GMACs that products on this machine's device take.

    Raises:
        ConfigError: a file can't be read, or no run can do what it says.
    """
    columns = f"{'GMACs':>8} {'of':>8} {'saved':>7} {'paper':>7} {'multiplied':>10} {'params M':>9} {'of':>7} {'paper':>6}"
    return "\n".join([f"{'config':33} {columns}", *map(_row, configs)])


def _row(path: Path) -> str:
    config = read_config(path)
    cost = count_flops(validate(config, world_size=None).model, config.model.image_size)
    saving, params = PUBLISHED.get(path.stem, ("-", "-"))
    return (
        f"{path.stem:33} {cost.sparse_macs / 1e9:8.3f} {cost.dense_macs / 1e9:8.3f} {100 * cost.saving:6.2f}% {saving:>7} "
        f"{cost.multiplied_macs / 1e9:10.3f} {cost.params_active / 1e6:9.2f} {cost.params_dense / 1e6:7.2f} {params:>6}"
    )
