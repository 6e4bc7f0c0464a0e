"""The run: options, competitors interleaved round by round, and what is printed at the end.

A benchmark is a function that takes a Bench and yields cases; a case is a name and a function that gives rows.
"""

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.benchmarks.machine import facts, measure_bandwidth, measure_matrix_rate
from tests.benchmarks.report import Ceilings, Row, json_line, table
from tests.benchmarks.upstream import Upstream
from tests.processor import cap_instruction_set

Samples = dict[str, dict[str, list[float]]]  # measure -> competitor -> seconds


@dataclass(frozen=True)
class Options:
    """The command line: see `parse_options`."""

    quick: bool = False
    device: str = "cpu"
    upstream_python: str | None = None
    only: str = ""
    json: str | None = None
    large: bool = False


class Bench:
    """What cases need: options, the device, ceilings measured once, and the other process."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.rates: dict[torch.dtype, float] = {}

    @property
    def quick(self) -> bool:
        """Whether two minutes must do."""
        return self.options.quick

    @property
    def rounds(self) -> int:
        """Timed rounds."""
        return 3 if self.quick else 7

    @property
    def warmups(self) -> int:
        """Rounds before them; the second is for what the first one compiled."""
        return 1 if self.quick else 2

    @cached_property
    def bandwidth(self) -> float:
        """Bytes read a second."""
        return measure_bandwidth(self.device)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """Of this machine, in this run."""
        if dtype not in self.rates:
            self.rates[dtype] = measure_matrix_rate(self.device, dtype)
        return Ceilings(self.bandwidth, self.rates[dtype])

    def new_upstream(self) -> Upstream | None:
        """A process with the original package, if its interpreter was named; on the CPU alone."""
        python = self.options.upstream_python
        return Upstream(python) if python and self.device.type == "cpu" else None

    @cached_property
    def upstream(self) -> Upstream | None:
        """One that stays for the whole run, so that its rounds can be interleaved with ours."""
        return self.new_upstream()

    def interleave(self, competitors: dict[str, Callable[[], dict[str, float]]]) -> Samples:
        """Time competitors in turn, A-B-A-B; see `interleave`."""
        return interleave(competitors, rounds=self.rounds, warmups=self.warmups)

    def close(self) -> None:
        """End the other process."""
        if self.__dict__.get("upstream") is not None:
            self.__dict__["upstream"].close()


class Case(NamedTuple):
    """Something to measure: a name that --only looks in, and a function."""

    name: str
    run: Callable[[], list[Row]]


Benchmark = Callable[[Bench], Iterable[Case]]


def interleave(competitors: dict[str, Callable[[], dict[str, float]]], *, rounds: int, warmups: int) -> Samples:
    """Call all competitors once a round, in their order, so that what disturbs the machine disturbs all alike.

    Args:
        competitors: each gives its times by name.
        rounds: that are kept.
        warmups: rounds before them, dropped.

    Returns:
        For each measure, for each competitor, as many samples as rounds.
    """
    samples: Samples = {}
    for number in range(warmups + rounds):
        for who, run in competitors.items():
            for measure, value in run().items():
                if number >= warmups:
                    samples.setdefault(measure, {}).setdefault(who, []).append(value)
    return samples


def parse_options(arguments: list[str] | None = None, *, description: str = "") -> Options:
    """The command line's options, refused before anything is measured if they cannot be met."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    parser.add_argument("--quick", action="store_true", help="few rounds, few sizes: two minutes on two cores")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--upstream-python", metavar="PATH", help="an interpreter with palm-rlhf-pytorch 0.8.0")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write the JSON line to a file too")
    parser.add_argument("--large", action="store_true", help="also a model of 8B parameters (CUDA)")
    options = Options(**vars(parser.parse_args(arguments)))
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.upstream_python and not Path(options.upstream_python).exists():
        parser.error(f"--upstream-python {options.upstream_python}: there is no such file")
    return options


def main(benchmarks: Iterable[Benchmark], *, description: str) -> None:
    """Run all cases that --only leaves, and print the table, the machine, and one JSON line last."""
    cap = cap_instruction_set()
    options = parse_options(description=description)
    bench = Bench(options)
    machine = facts(bench.device, instruction_cap=cap)
    rows: list[Row] = []
    try:
        for case in _chosen(benchmarks, bench):
            started = time.perf_counter()
            rows += case.run()
            gc.collect()  # the models of a case are large, and hold on to each other
            print(f"... {case.name}: {time.perf_counter() - started:.1f} s", flush=True)
    except BaseException:
        print(table(rows))  # what was measured before is not lost
        raise
    finally:
        bench.close()
    if not rows:
        raise SystemExit(f"--only {options.only!r} leaves no case")
    report = facts_of_run(bench, machine)
    print(table(rows))
    for name, value in {**machine, **report["ceilings"]}.items():
        print(f"{name}: {value}")
    line = json_line(rows, report)
    if options.json:
        Path(options.json).write_text(line + "\n", encoding="utf-8")
    print(line)


def facts_of_run(bench: Bench, machine: dict[str, Any]) -> dict[str, Any]:
    """Machine, options, and the ceilings that were measured."""
    rates = {f"matrix_flops_{str(dtype).removeprefix('torch.')}": rate for dtype, rate in bench.rates.items()}
    read = {"read_bytes_per_second": bench.bandwidth} if "bandwidth" in bench.__dict__ else {}
    return {"machine": machine, "ceilings": read | rates, "options": vars(bench.options)}


def _chosen(benchmarks: Iterable[Benchmark], bench: Bench) -> Iterator[Case]:
    for benchmark in benchmarks:
        for case in benchmark(bench):
            if bench.options.only in case.name:
                yield case
