"""The parts that a page is made of, and how several runs are told apart in them."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from svite_scale.report.html import Html, tag
from svite_scale.report.reported_run import ReportedRun

Runs = Sequence[ReportedRun]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        content: of the section.
        lead: a sentence under the heading; may be empty.
    """

    title: str
    content: Html
    lead: str = ""

    @property
    def anchor(self) -> str:
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Pictures:
    """Collects the pictures of a page, which are in it and beside it.

    Attributes:
        files: contents by file name.
        notes: why pictures are missing that the run could have.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, content: bytes, alt: str, **attributes: object) -> Html:
        """Returns an ``img`` element that holds a picture; ``name`` has the suffix of its format."""
        self.files[name] = content
        source = f"data:image/{name.rpartition('.')[2]};base64,{b64encode(content).decode()}"
        return tag("img", src=source, alt=alt, **attributes)


def run_label(runs: Runs, run: ReportedRun) -> str:
    """Returns a run's name; with its folders, if another run has the same."""
    return run.name if sum(each.name == run.name for each in runs) == 1 else str(run.run_dir)


def of_run(runs: Runs, run: ReportedRun) -> str:
    """Returns the start of a heading that says which run it is about; empty if there is only one."""
    return "" if len(runs) == 1 else f"{run_label(runs, run)}: "


def heading(runs: Runs, run: ReportedRun) -> list[Html]:
    """Returns the heading of one run's part of a section; none if there is only one run."""
    return [] if len(runs) == 1 else [tag("h4", run_label(runs, run))]
