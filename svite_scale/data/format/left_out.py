"""Files that make no sample, counted by kind, so that none is left out without a word."""

from __future__ import annotations

from collections.abc import Mapping

SHOWN = 10
HIDDEN = "hidden"
CONVERT = "convert them to PNG or JPEG (ImageMagick: mogrify -format png FILES)"
SPECIAL = "special (pipe, socket or device)"


def kind_of(extension: str) -> str:
    """What a file is counted as: its extension, which is given without the dot, or what it has instead."""
    return f".{extension}" if extension else "without extension"


def in_words(left_out: Mapping[str, int]) -> str:
    """``4 .v2.jpg, 2 .webp``: the most frequent first, and in one line of ASCII whatever the names; empty if there are none."""
    kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    parts = [f"{left_out[kind]} {kind.encode('unicode_escape').decode()}" for kind in kinds[:SHOWN]]
    if len(kinds) > SHOWN:
        parts.append(f"{sum(left_out[kind] for kind in kinds[SHOWN:])} others")
    return ", ".join(parts)
