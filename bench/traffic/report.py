"""What was counted in one case, checked against its limits, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import layers
from .cases import TABLES, Case, Check, Problem, multiprocessors
from .predict import FORMULA, PARTS, Work, predicted
from .recorder import Count, Launch, record

Resources = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One case's counted launches."""

    case: Case
    problem: Problem
    launches: list[Launch]

    def bytes(self, kind: str) -> int:
        """DRAM bytes that are "input", "output", "partial" (stored by one launch, loaded by a later one) or "table"."""
        return sum(count.dram for launch, name, way, count in self._counts() if kind == self._kind(launch, name, way))

    def total(self, what: str) -> int:
        return sum(launch.total(what) for launch in self.launches)

    def ratio(self, least: int) -> float:
        """DRAM bytes, without tables, per byte of `least`."""
        return (self.total("dram") - self.bytes("table")) / least

    @property
    def checks(self) -> list[Check]:
        least, sectors, limit = self.problem.minimum, self.problem.sectors, self.problem.limit
        checks = [Check("DRAM / minimum", self.ratio(least), limit)]
        if limit is not None and sectors > limit * least:
            # No kernel can read less than a sector: what the table leaves unused of one is its own price.
            checks = [
                Check("DRAM / minimum", self.ratio(least), None),
                Check("DRAM / its sectors", self.ratio(sectors), limit),
            ]
        return [*checks, *self.problem.checks(self.launches)]

    @property
    def work(self) -> list[Work]:
        return [Work(launch.total("dram"), launch.flops) for launch in self.launches]

    def _counts(self) -> Iterator[tuple[Launch, str, str, Count]]:
        for launch in self.launches:
            for (name, way), count in launch.counts.items():
                yield launch, name, way, count

    def _kind(self, launch: Launch, name: str, way: str) -> str:
        if any(word in name.split("_") for word in TABLES):
            return "table"
        if launch.storages[name] in self._partial():
            return "partial"
        return "input" if way == "load" else "output"

    def _partial(self) -> set[int]:
        """Return where tensors lie that one launch stores and a later one loads."""
        found, stored = set(), set()
        for launch in self.launches:
            ways = {way: {launch.storages[n] for n, w in launch.counts if w == way} for way in ("load", "store")}
            found |= stored & ways["load"]
            stored |= ways["store"]
        return found


def count(case: Case) -> Result:
    """Interpret one case."""
    problem = case.build()
    with multiprocessors(case.multiprocessors), record() as launches:
        problem.call()
    return Result(case, problem, launches)


def missed(results: Sequence[Result]) -> list[str]:
    """Say which limits do not hold, and by how much."""
    found = []
    for result in results:
        for check in result.checks:
            if check.limit is not None and check.value > check.limit:
                whole = result.ratio(result.problem.sectors or result.problem.minimum)
                found.append(
                    f"{result.case.name}: {check.name} is {check.value:.3f}, the limit is {check.limit:.2f} "
                    f"({result.launches[0].kernel}; {whole:.3f} of the sectors that its values lie in)"
                )
    return found


def row(result: Result, resources: Resources) -> dict[str, Any]:
    """Return everything about one case, for the CSV file."""
    problem, own = result.problem, result.work
    flops = {width: sum(w.flops.get(width, 0) for w in own) for width in (16, 32)}
    found: dict[str, Any] = {
        "case": result.case.name,
        "kernels": " + ".join(launch.kernel for launch in result.launches),
        "multiprocessors": result.case.multiprocessors,
        "requested_bytes": result.total("requested"),
        "dram_input_bytes": result.bytes("input"),
        "dram_output_bytes": result.bytes("output"),
        "dram_partial_bytes": result.bytes("partial"),
        "dram_table_bytes": result.bytes("table"),
        "l2_bytes": result.total("l2"),
        "minimum_bytes": problem.minimum,
        "dram_per_minimum": round(result.ratio(problem.minimum), 4),
        "dram_per_sectors": round(result.ratio(problem.sectors or problem.minimum), 4),
        "limit": problem.limit,
        "flops_16": flops[16],
        "flops_32": flops[32],
    }
    for part, arch in PARTS.items():
        found[f"predicted_us_{part}"] = round(1e6 * predicted(own, arch), 3)
        other = None if problem.gaussian is None else round(1e6 * predicted(problem.gaussian, arch), 3)
        found[f"predicted_us_{part}_gaussian"] = other
    return found | {f"sm_90_{name}": value for name, value in resources.items()}


def markdown(results: Sequence[Result], rows: Sequence[dict[str, Any]], versions: str) -> str:
    """Return the report."""
    head = _HEAD.format(versions=versions)
    parts = [head, _traffic(rows), _checks(results), _times(rows), _layers(), _occupancy(rows)]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Memory traffic of the Triton kernels

Counted by `python -m bench.traffic`, which runs each kernel in Triton's interpreter and records every address
({versions}). No GPU was involved, and no time was measured.

- MB are 10^6 bytes. *Requested*: all lanes of all loads and stores. *DRAM*: distinct 32-byte sectors of a launch,
  summed over launches. *L2*: distinct sectors of each program, summed over programs.
- *Minimum*: each input byte that the op uses once, touched sectors where survivors are scattered, and each output
  byte once. *Partial* results, which one launch leaves for the next, are part of the ratio, not of the minimum.
  Tables are part of neither. *Its sectors*: the minimum with whole sectors for all inputs. The limit is on these
  where the values that a table keeps fill so little of their sectors that no kernel could hold the other: runs of 8
  in 16 bits are half a sector, so 1.8 times the bytes that are used have to move. Take runs of 16 there.
- Tiles are sm_90's. Problems are scaled down, and so is the number of multiprocessors that launchers see
  (`multiprocessors` in traffic.csv; an H100 has 132): sums are split as in a whole problem on a whole part.
  *2 samples* and *split* show all 132, where a sum is split because multiprocessors would idle.
- The interpreter has no bfloat16. Inputs are float16, which is of the same size, except where a name says otherwise."""


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mega(value: int) -> str:
    return f"{value / 1e6:.3f}"


def _traffic(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("requested", "dram_input", "dram_output", "dram_partial", "dram_table", "l2", "minimum")
    header = ["case", *(f"{c.replace('dram_', 'DRAM ').replace('l2', 'L2')} MB" for c in columns)]
    body = [
        [
            r["case"],
            *(_mega(r[f"{c}_bytes"]) for c in columns),
            f"{r['dram_per_minimum']:.3f}",
            f"{r['dram_per_sectors']:.3f}",
        ]
        for r in rows
    ]
    return "## Counted traffic\n\n" + _table([*header, "DRAM / minimum", "DRAM / its sectors"], body)


def _checks(results: Sequence[Result]) -> str:
    body = [
        [
            result.case.name,
            check.name,
            f"{check.value:.3f}",
            "none" if check.limit is None else f"{check.limit:.2f}",
            "" if check.limit is None else "missed" if check.value > check.limit else "holds",
        ]
        for result in results
        for check in result.checks
    ]
    return "## Limits\n\n" + _table(["case", "ratio", "value", "limit", ""], body)


def _times(rows: Sequence[dict[str, Any]]) -> str:
    header = ["case"]
    for part in PARTS:
        header += [f"{part}, predicted µs", f"{part}, Gaussian, predicted µs", "predicted ratio"]
    body = []
    for r in rows:
        line = [r["case"]]
        for part in PARTS:
            own, other = r[f"predicted_us_{part}"], r[f"predicted_us_{part}_gaussian"]
            line += [f"{own:.2f}"] + (["", ""] if other is None else [f"{other:.2f}", f"{other / own:.1f}"])
        body.append(line)
    rates = "\n".join(
        f"- {part}: {a.bandwidth / 1e12:.2f} TB/s, {a.flops16 / 1e12:.0f} Tflop/s in 16 bits, "
        f"{a.flops32 / 1e12:.0f} Tflop/s at float32 accuracy"
        for part, a in PARTS.items()
    )
    text = f"## Predicted times\n\n{FORMULA}, with data sheet numbers:\n\n{rates}\n\n{_TIMES}"
    return text + "\n\n" + _table(header, body)


_TIMES = """Launch latency and arithmetic outside the matrix units are left out. Microseconds are those of the scaled
problems on a whole part; the ratios carry over. MI300X is given the tiles and the 32-byte sectors of sm_90.
*Gaussian*: the same formula for Gaussian factors of the same output size, a GEMM [N T, d] x [d, k] for each
sketched side (for a convolution, one to k channels) whose result is written, and a batched product that reads it."""


def _layers() -> str:
    header = ["`compress_linear` in 16 bits, H100", "predicted µs", "over Gaussian factors", "over gather, then bmm"]
    text = f"""## Predicted times of layers of language models

By the same formula, with the sectors that a uniform mask is expected to touch, and no launch shorter than
{1e6 * layers.LAUNCH:.0f} µs. *Gather, then bmm*: `index_select` of either side, then a batched product."""
    return text + "\n\n" + _table(header, layers.lines())


def _occupancy(rows: Sequence[dict[str, Any]]) -> str:
    names = ("kernel", "registers", "shared", "warps", "programs")
    header = ["case", "main kernel", "registers a thread", "shared bytes", "warps", "programs a multiprocessor"]
    body = [[r["case"], *(str(r[f"sm_90_{name}"]) for name in names)] for r in rows]
    return (
        "## Compiled for sm_90\n\nFrom the cubin; programs fit by registers, shared memory and threads.\n\n"
        + _table(header, body)
    )
