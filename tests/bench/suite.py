"""Runs the benchmarks and writes what they gave; `tests/bench/run` calls it. A goal that is missed is not an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import dpi
import half_open
import hosts
import interfaces
import kernel_policy
import lists
import mix
import named
import owner_policy
import proxies
import queues
import results
import shown
import watching
from bed import HERE  # it makes the modules of tests/ known
from measure import Benchmark, Goal, Result, measure

DPI = Benchmark(
    "dpi", "a TLS flow identified", "us of CPU a flow",
    {
        "hello in one segment": lambda: dpi.cost(dpi.ours, dpi.flows(dpi.FLOWS, 1), 1),
        "hello in three segments": lambda: dpi.cost(dpi.ours, dpi.flows(dpi.FLOWS, 3), 1),
        "dpkt, the name alone": lambda: dpi.cost(dpi.with_dpkt, dpi.flows(dpi.FLOWS, 1), 1),
    },
    (Goal("hello in one segment", "at most", dpi.GOAL),),
)  # fmt: skip
# Asked for by a condition on them.
_FINGERPRINTS: list[Mapping[str, object]] = [{"action": "drop", "when": 'ja3 = "0" or ja4 = "0"'}, *shown.RULES]
FLOW = Benchmark(
    "tls-flow", "a TLS flow named and judged, in a worker without a kernel", "us of CPU a flow",
    {
        "one segment": lambda: shown.identified(1),
        "three segments": lambda: shown.identified(3),
        "one segment, JA3 and JA4": lambda: shown.identified(1, _FINGERPRINTS),
        "three segments, JA3 and JA4": lambda: shown.identified(3, _FINGERPRINTS),
        "one segment, JA3 and JA4 new each time": lambda: shown.identified(1, _FINGERPRINTS, differ=True),
        "three segments, JA3 and JA4 new each time": lambda: shown.identified(3, _FINGERPRINTS, differ=True),
        "dpkt, the name alone": lambda: dpi.cost(dpi.with_dpkt, dpi.flows(dpi.FLOWS, 1), 1),
    },
    (Goal("one segment", "at most", 2), Goal("one segment", "at most", 0.1, "dpkt, the name alone"),
     Goal("three segments", "at most", 10), Goal("one segment, JA3 and JA4", "at most", 25),
     Goal("three segments, JA3 and JA4", "at most", 35), Goal("one segment, JA3 and JA4 new each time", "at most", 25),
     Goal("three segments, JA3 and JA4 new each time", "at most", 35)),
)  # fmt: skip
BENCHMARKS = (
    *queues.BENCHMARKS,
    *kernel_policy.BENCHMARKS,
    *owner_policy.BENCHMARKS,
    *named.BENCHMARKS,
    *mix.BENCHMARKS,
    *half_open.BENCHMARKS,
    *hosts.BENCHMARKS,
    *proxies.BENCHMARKS,
    *interfaces.BENCHMARKS,
    *lists.BENCHMARKS,
    *watching.BENCHMARKS,
    DPI,
    FLOW,
)
FOLDER: Path = HERE / "results"


def main() -> int:
    """Measure; 1 if a measurement could not be had."""
    parser = argparse.ArgumentParser(prog="tests/bench/run", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", choices=[each.name for each in BENCHMARKS])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--list", action="store_true", help="say the names")
    asked = parser.parse_args()
    if asked.list:
        for each in BENCHMARKS:
            print(f"{each.name}: {each.title}")
        return 0
    if os.geteuid() != 0:
        print("tests/bench/run: namespaces and rules need root", file=sys.stderr)
        return 1
    about = {**results.machine(), "rounds": asked.rounds}
    done: list[Result] = []
    failed = False
    for benchmark in BENCHMARKS:
        if asked.only and benchmark.name not in asked.only:
            continue
        try:
            done.append(measure(benchmark, asked.rounds, lambda line: print(line, file=sys.stderr)))
        # One that cannot be measured does not keep the others from it.
        except Exception as error:
            failed = True
            print(f"{benchmark.name}: {type(error).__name__}: {error}", file=sys.stderr)
    FOLDER.mkdir(exist_ok=True)
    print(results.write(done, about, FOLDER))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
