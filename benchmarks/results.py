"""What a run of the benchmark suite measured, and where: read from pytest's reports, written as CSV and JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from protomem_kernels.training.files import written_whole


@dataclass(frozen=True)
class Results:
    """The rows of a run, one per benchmark, and what came to no figure."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    not_measured: list[str]  # reasons, each once
    failed: list[str]  # names


class Verdict(NamedTuple):
    """Whether a figure is what it must be, and what it aims at."""

    must: bool
    aim: bool


def verdict(value: float, must: float, aim: float) -> Verdict:
    """Compare a figure with its two bounds: upper bounds, or lower ones where the aim lies above.

    >>> verdict(2.0, must=2.1, aim=1.6), verdict(4.0, must=5, aim=10)
    (Verdict(must=True, aim=False), Verdict(must=False, aim=False))
    """
    sign = 1 if aim > must else -1
    return Verdict(sign * value >= sign * must, sign * value >= sign * aim)


def read_results(folder: Path, where: dict[str, Any]) -> Results:
    """Read what pytest left in the folder: ``benchmark.json`` (figures) and ``junit.xml`` (skips and failures)."""
    file = folder / "benchmark.json"
    measured = json.loads(file.read_text(encoding="utf-8") or "{}") if file.exists() else {}
    rows = [
        {
            "name": item["fullname"].split("/")[-1],
            **item["extra_info"],
            "seconds": item["stats"]["median"],
            "seconds_min": item["stats"]["min"],
            "rounds": item["stats"]["rounds"],
        }
        for item in measured.get("benchmarks", [])
    ]
    cases = list(ElementTree.parse(folder / "junit.xml").iter("testcase"))
    skips = [skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None]
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    return Results(where, rows, list(dict.fromkeys(skips)), failed)


def write_results(folder: Path, results: Results) -> None:
    """Write ``results.json``, and ``results.csv`` with the machine in every line."""
    content = {"machine": results.machine, "results": results.rows}
    content |= {"not_measured": results.not_measured, "failed": results.failed}
    with written_whole(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    columns = list(dict.fromkeys(key for row in results.rows for key in row))
    with (
        written_whole(folder / "results.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, [*columns, *results.machine])
        writer.writeheader()
        writer.writerows(row | results.machine for row in results.rows)
