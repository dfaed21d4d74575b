"""The figures on disk: DIR/PROCESSOR/results.json, and the figures of all processors beside each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.machine import folder_name
from benchmarks.tables import by_case
from benchmarks.vocabulary import TITLES, Failed, Record
from inception.files import replace_file

HERE = Path(__file__).with_name("results")


def read(path: Path) -> Record:
    """The parts in a results.json; raises Failed where another program wrote the file."""
    try:
        parts: Record = json.loads(path.read_text(encoding="utf-8"))
        ours = all({"found", "machine", "quick"} <= part.keys() for part in parts.values())
    except (ValueError, AttributeError):
        ours = False
    if not ours:
        raise Failed(f"{path} was not written by this program: move it away")
    return parts


class Results:
    """The results.json of one processor: each part with the conditions of its measurement. Other parts in it stay."""

    def __init__(self, folder: Path | None, conditions: Record):
        where = conditions["machine"]
        self.folder = folder / folder_name(where) if folder else None
        self.path = self.folder / "results.json" if self.folder else None
        self.parts = read(self.path) if self.path and self.path.exists() else {}
        self.conditions = conditions
        self.suffix = "_gpu" if where.get("gpu") else ""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)

    def keep(self, part: str, found: Any, started: float) -> None:
        """Write what has been found so far of a part that began at `started`."""
        minutes = round((time.perf_counter() - started) / 60, 1)
        self.parts[part + self.suffix] = self.conditions | {"minutes": minutes, "found": found}
        text = json.dumps(self.parts, indent=1) + "\n"

        def write(file: BinaryIO) -> None:
            file.write(text.encode())

        if self.path:
            replace_file(self.path, write)


def side_by_side(folder: Path) -> str:
    """The comparisons of every processor in a folder of results, as a Markdown table.

    A processor's cell: milliseconds of minigrad, and in parentheses its ratio to PyTorch's better eager format and to
    the best compiled engine, – where that was not measured.
    """
    machines = {path.parent.name: read(path) for path in sorted(folder.glob("*/results.json"))}
    columns: dict[str, dict[tuple, str]] = {}
    for parts in machines.values():
        if "compare" in parts:
            where = parts["compare"]["machine"]
            python = where.get("versions_of_minigrad", where["versions"])["python"]
            head = f"{where['cpu']}, {where['cores']} cores, Python {python}, {where['date']}"
            columns[head] = {case: cell(rows) for case, rows in by_case(parts["compare"]["found"]).items()}
    cases = dict.fromkeys(case for column in columns.values() for case in column)
    lines = [["workload", "batch", "threads", "", *columns], ["---"] * (4 + len(columns))]
    for case in sorted(cases, key=lambda case: (case[0], case[1], case[2], [*TITLES].index(case[3]))):
        name, batch, n, measure = case
        lines.append([f"`{name}`", str(batch), str(n), TITLES[measure], *(c.get(case, "") for c in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(rows: dict[str, Record]) -> str:
    if "ours" not in rows:
        return ""
    best = [next((r for r in rows.values() if r.get(f"best_{kind}")), None) for kind in ("eager", "compiled")]
    ratios = [f"{row['ratio_seconds']:.2f}" if row else "–" for row in best]
    return f"{rows['ours']['seconds'] * 1e3:,.0f} ms ({', '.join(ratios)})"
