"""The model card of an export: ``README.md`` in its folder."""

from __future__ import annotations

from pathlib import Path

from svite_scale.export.form import Export, Notes

CARD = "README.md"


def write_card(export: Export, notes: Notes, folder: Path) -> None:
    """Writes the card."""
    (folder / CARD).write_text(f"# {export.description.origin.run}\n\n{notes.usage}", encoding="utf-8")
