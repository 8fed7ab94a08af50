"""What was measured, for people and for programs: a table in Markdown, figures in JSON, and a plot by gnuplot."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from measure import Result


def machine() -> dict[str, Any]:
    """What kind of machine it is."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    virtual = any("hypervisor" in line for line in Path("/proc/cpuinfo").read_text().splitlines())
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": virtual,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> str:
    """Write all three; the table."""
    text = table(results, about)
    (folder / "results.md").write_text(text)
    (folder / "results.json").write_text(json.dumps({"machine": about, "benchmarks": _objects(results)}, indent=1) + "\n")
    _plot(results, folder)
    return text


def _objects(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [
        {
            "name": result.benchmark.name,
            "title": result.benchmark.title,
            "unit": result.benchmark.unit,
            "series": {name: {"median": median(values), "rounds": values} for name, values in result.series.items()},
            "goals": [
                {"goal": f"{goal.series}: {goal}", "reached": result.reached(goal), "rounds": result.ratios(goal),
                 "met": None if (reached := result.reached(goal)) is None else goal.met(reached)}
                for goal in result.benchmark.goals
            ],
        }
        for result in results
    ]  # fmt: skip


def table(results: Sequence[Result], about: dict[str, Any]) -> str:
    """The table: each series with its median and spread, and what is asked of it."""
    lines = [
        f"{about['processor']}, {about['cores']} cores{', virtual' if about['virtual'] else ''}, Linux {about['kernel']}, "
        f"Python {about['python']}; {about['rounds']} rounds, load before {about['load_before']:.2f}.",
        "",
        "| benchmark | series | median | lowest to highest | goal | reached | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        place = f"**{result.benchmark.name}**: {result.benchmark.title}"
        for name, values in result.series.items():
            unit = f" {result.benchmark.unit}" if result.benchmark.unit else ""
            row = [place, name, f"{_figure(median(values))}{unit}", f"{_figure(min(values))} to {_figure(max(values))}"]
            place = ""
            goals = [goal for goal in result.benchmark.goals if goal.series == name]
            asked = "<br>".join(map(str, goals))
            reached = [(goal, result.reached(goal)) for goal in goals]
            said = "<br>".join("not measured" if value is None else f"{value:.3g}" for _, value in reached)
            met = "<br>".join("" if value is None else "met" if goal.met(value) else "**missed**" for goal, value in reached)
            lines.append("| " + " | ".join([*row, asked, said, met]) + " |")
    return "\n".join([*lines, ""])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _plot(results: Sequence[Result], folder: Path) -> None:
    """Every goal as a bar: what was reached as a multiple of it, 1 and more being good, with the rounds' spread."""
    rows = []
    for result in results:
        for goal in result.benchmark.goals:
            if goal.figure and (ratios := result.ratios(goal)):
                of = [each / goal.figure if goal.bound == "at least" else goal.figure / each for each in ratios if each]
                if of:
                    rows.append((f"{result.benchmark.name}: {goal.series}, {goal}", median(of), min(of), max(of)))
    if not rows:
        return
    data = "\n".join(f'{place} {m:.4f} {low:.4f} {high:.4f} "{label}"' for place, (label, m, low, high) in enumerate(rows, 1))
    script = f"""
set terminal svg size 1000,{80 + 26 * len(rows)} font 'sans,12' background 'white'
set output '{folder / "results.svg"}'
set title 'What was reached, as a multiple of the goal'
set xrange [0:*]
set yrange [{len(rows) + 0.7}:0.3]
set grid x
set arrow from 1, graph 0 to 1, graph 1 nohead lw 2 lc 'black' front
set style fill solid 0.6 noborder
unset key
$data << END
{data}
END
plot $data using ($2/2):1:($2/2):(0.35):($2 >= 1 ? 0x3a7d44 : 0xb5432a):yticlabels(5) with boxxyerror lc rgb variable, \\
     $data using 2:1:3:4 with xerrorbars pt 0 lc 'black'
"""
    subprocess.run(["gnuplot"], input=script, text=True, check=True)
