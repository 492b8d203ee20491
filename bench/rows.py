"""What was measured: one row per measurement, as a line of a table and as JSON; and the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

Side = Literal["library", "engine"]
SIDES: tuple[Side, ...] = ("library", "engine")
TABLE_HEAD = "| | official library | engine | times better |\n|---|---|---|---|"


@dataclass
class Row:
    """One measurement: every round of each side.

    `note` says what is peculiar about it, `others_share` what part of the cores other processes
    had meanwhile, and `disturbed` that this was too much.
    """

    key: str
    title: str
    unit: str
    more_is_better: bool = False
    note: str = ""
    others_share: float = 0.0
    disturbed: bool = False
    rounds: dict[Side, list[float]] = field(default_factory=dict)

    def add(self, side: Side, value: float) -> None:
        """One more round of one side."""
        self.rounds.setdefault(side, []).append(value)

    def median(self, side: Side) -> float | None:
        """The middle one of a side's rounds; None if it was not measured."""
        return median(self.rounds[side]) if self.rounds.get(side) else None

    def ratio(self) -> float | None:
        """How many times better the engine is than the library."""
        library, engine = self.median("library"), self.median("engine")
        if not library or not engine:
            return None
        return engine / library if self.more_is_better else library / engine

    def as_json(self) -> dict[str, Any]:
        """All rounds, with medians and the ratio."""
        sides = {
            side: {"median": self.median(side), "rounds": self.rounds.get(side, [])}
            for side in SIDES
        }
        facts: dict[str, Any] = {"title": self.title, "unit": self.unit, "note": self.note}
        facts |= {"others_share": round(self.others_share, 3), "disturbed": self.disturbed}
        return facts | sides | {"engine_times_better": self.ratio()}

    def as_markdown(self) -> str:
        """A line of the table."""
        figures = [_figure(self.median(side)) for side in SIDES]
        mark = f", DISTURBED {self.others_share:.0%}" if self.disturbed else ""
        cells = [f"{self.title} ({self.unit}){mark}", *figures, _figure(self.ratio())]
        return f"| {' | '.join(cells)} |"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def table(rows: list[Row]) -> str:
    """The rows as Markdown, with their notes below."""
    notes = [f"- {row.title}: {row.note}." for row in rows if row.note]
    if any(row.disturbed for row in rows):
        notes.append("- DISTURBED: others had this share of the cores. Do not use these figures.")
    return "\n".join([TABLE_HEAD, *(row.as_markdown() for row in rows), "", *notes])


@dataclass
class Report:
    """What the run has found so far, and the file that holds it."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write it, so that a run that is stopped leaves what it has."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.values, indent=1), encoding="utf-8")
        draft.replace(self.path)
