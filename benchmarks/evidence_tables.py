"""The tables of docs/accuracy.md: which runs each of their rows has."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Column = Callable[[Sequence[Any]], str]
"""Makes a cell from a row's results, one per seed."""


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds only; ``overrides`` of the table's config make them."""

    label: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows that are compared; the first one is the dense model.

    Attributes:
        rows: at least one.
        shared: overrides of all rows.
        config: file of the runs.
        shards: folder of the images, within that of all shards.
        columns: more columns than all tables have, by their heads.
    """

    rows: tuple[Row, ...]
    shared: tuple[str, ...] = ()
    config: str = "configs/glyphs.yaml"
    shards: str = "glyphs"
    columns: Mapping[str, Column] = field(default_factory=dict)

    def overrides(self, row: Row) -> tuple[str, ...]:
        return (*self.shared, *row.overrides)


def fraction(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.2f}" if known else ""


MOVING = ("sparsity.update_every=94",)
"""16 topology updates in the first 0.8 of 1,924 steps."""

UNITS = ("sparsity.structured.heads=0.6", "sparsity.structured.neurons=0.6", *MOVING)
GENTLY = "sparsity.structured.drop_fraction=0.05"
TOKENS = "sparsity.tokens"
DENSE = "sparsity.density=1.0"
CANVAS = ("model.image_size=42", "model.patch_size=6", "model.embed_dim=64", "optimizer.lr=3e-3", "train.epochs=3")
"""A small model for 49 patches, of which a glyph covers 13 on average. After one epoch it hasn't learnt to find them."""

FASTER = "optimizer.lr=3e-3"
"""Twice the dense model's rate, which small and sparse models want."""


def narrow(width: int) -> Row:
    return Row(f"dense, width {width}", (f"model.embed_dim={width}", FASTER))


def weights(density: float, kind: str, *overrides: str) -> Row:
    return Row(f"{100 - 100 * density:g}% absent, {kind}", (f"sparsity.density={density}", FASTER, *overrides))


def inits(width: int, lr: float) -> list[Row]:
    """Returns the rows of a width: the first weights of timm's or by init_gain, scaled for their density or not."""
    rows = []
    for gain in ("null", "0.7"):
        shared = (f"model.embed_dim={width}", f"model.num_heads={width // 32}", f"model.init_gain={gain}")
        label = f"width {width}, `init_gain: {gain}`"
        rows.append(Row(f"{label}, dense", (*shared, f"optimizer.lr={lr}")))
        for init in ("dense", "fan_in"):
            sparse = ("sparsity.density=0.1", "sparsity.method=static", f"sparsity.init={init}", f"optimizer.lr={2 * lr}")
            rows.append(Row(f"{label}, 90% absent, `init: {init}`", (*shared, *sparse)))
    return rows


FIXED = ("fixed", "sparsity.method=static")
MOVES = ("moving", *MOVING)
MOVES_GENTLY = ("moving, drop fraction 0.1", *MOVING, "sparsity.drop_fraction=0.1")
"""The end of a row's label, and its overrides."""

WIDE = "model.embed_dim=384", "model.num_heads=12"
"""The width of DeiT-Small, whose sides have 24 blocks of 16."""


def wide_blocks(density: float, block: str, kind: str, *overrides: str) -> Row:
    return weights(density, f"{block}, {kind}", *WIDE, f"sparsity.block={block}", "optimizer.lr=1.5e-3", *overrides)


TABLES: dict[str, Table] = {
    "weights": Table(
        (
            Row("dense"),
            *(narrow(width) for width in (72, 48, 32)),
            *(weights(density, *kind) for density in (0.3, 0.1, 0.05, 0.02, 0.01) for kind in (FIXED, MOVES)),
            *(weights(density, *MOVES_GENTLY) for density in (0.1, 0.01)),
        )
    ),
    "blocks": Table(
        (
            Row("dense", (*WIDE, "optimizer.lr=7.5e-4")),
            Row("dense, twice the learning rate", (*WIDE, "optimizer.lr=1.5e-3")),
            Row("dense, width 192", ("model.embed_dim=192", "model.num_heads=6", "optimizer.lr=1.5e-3")),
            Row("dense, width 128", ("optimizer.lr=1.5e-3",)),
            wide_blocks(0.1, "[1, 1]", *FIXED),
            *(
                wide_blocks(density, block, *kind)
                for density in (0.3, 0.1)
                for block in ("[16, 16]", "[32, 1]")
                for kind in (FIXED, MOVES_GENTLY)
            ),
            wide_blocks(0.1, "[16, 16]", *MOVES),
        )
    ),
    "narrow_blocks": Table(
        (
            Row("dense"),
            *(
                weights(0.1, f"{block}, fixed", "sparsity.method=static", f"sparsity.block={block}")
                for block in ("[1, 1]", "[4, 4]", "[8, 8]", "[32, 1]", "[16, 16]")
            ),
        )
    ),
    "units": Table(
        (
            Row("dense"),
            narrow(96),
            Row("40% absent, fixed", (*UNITS, "sparsity.method=static")),
            Row("40% absent, moving", (*UNITS, GENTLY)),
            Row("40% absent, moving, `protect_grown`", (*UNITS, GENTLY, "sparsity.protect_grown=true")),
            Row("40% absent, moving, drop fraction 0.5", (*UNITS, "sparsity.structured.drop_fraction=0.5")),
            Row(
                "40% absent, `grow: paper`",
                (*UNITS, "sparsity.structured.grow=paper", "sparsity.structured.drop_fraction=0.5"),
            ),
        ),
        columns={
            "heads ever active": lambda found: fraction([run.ever_active.get("heads") for run in found]),
            "neurons ever active": lambda found: fraction([run.ever_active.get("neurons") for run in found]),
        },
    ),
    "tokens": Table(
        (
            Row("all tokens"),
            *(Row(f"{keep:.0%} of the tokens", (f"{TOKENS}.keep={keep}",)) for keep in (0.7, 0.5, 0.3)),
            Row("50%, before block 1", (f"{TOKENS}.keep=0.5", f"{TOKENS}.blocks=[1]")),
            Row("50%, `keep_warmup: 0.3`", (f"{TOKENS}.keep=0.5", f"{TOKENS}.keep_warmup=0.3")),
            Row("50%, `signal: paper`", (f"{TOKENS}.keep=0.5", f"{TOKENS}.signal=paper")),
            Row("all, 50% in training by chance", (f"{TOKENS}.training_keep=0.5", f"{TOKENS}.signal=random")),
            Row("all, 50% in training by score", (f"{TOKENS}.training_keep=0.5",)),
            *(
                Row(
                    f"95% of the tokens, 50% of the weights absent, {kind}",
                    (f"{TOKENS}.keep=0.95", "sparsity.density=0.5", override),
                )
                for kind, override in (("fixed", "sparsity.method=static"), ("moving", "sparsity.update_every=282"))
            ),
            Row("all tokens, width 44", ("model.embed_dim=44",)),
        ),
        shared=CANVAS,
        shards="glyphs42",
        columns={"patches with ink kept": lambda found: fraction([run.ink_kept for run in found])},
    ),
    "digits": Table(
        (
            Row("dense", (DENSE,)),
            Row("70% of the weights absent, fixed", ("sparsity.method=static",)),
            Row("70% of the weights absent, moving: the quick start"),
            Row("40% of heads and neurons absent, fixed", (DENSE, *UNITS[:2], "sparsity.method=static")),
            Row("40% of heads and neurons absent, moving", (DENSE, *UNITS[:2], GENTLY)),
            *(Row(f"{keep:.0%} of the tokens", (DENSE, f"{TOKENS}.keep={keep}")) for keep in (0.7, 0.5)),
        ),
        config="configs/quickstart.yaml",
        shards="mnist5k",
        columns={"patches with ink kept": lambda found: fraction([run.ink_kept for run in found])},
    ),
    "init": Table(tuple(row for width, lr in ((128, 1.5e-3), (192, 1.2e-3), (384, 7.5e-4)) for row in inits(width, lr))),
}
"""By name, which the page's marks have too."""
