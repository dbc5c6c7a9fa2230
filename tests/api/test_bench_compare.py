"""The comparison of benchmark runs: a slower machine is no change, a slower benchmark is one, noise is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import compare

OLD = {("group", name): (median, 0.01) for name, median in {"a": 1.0, "b": 2.0, "c": 3.0, "d": 40.0, "e": 0.5}.items()}


def scaled(factor, **changed):
    return {key: (factor * median * changed.get(key[1], 1.0), factor * iqr) for key, (median, iqr) in OLD.items()}


def test_another_machine_is_no_change():
    machine, found = compare.changes(OLD, scaled(2.5))
    assert machine == pytest.approx(2.5)
    assert found == []


def test_what_got_slower_is_named_and_what_got_faster():
    _, found = compare.changes(OLD, scaled(2.5, d=1.5, b=0.5))
    assert [(round(ratio, 3), key[1]) for ratio, key in found] == [(1.5, "d"), (0.5, "b")]


def test_a_difference_within_the_spread_of_either_run_is_noise():
    noisy = scaled(1.0, a=1.3)
    assert len(compare.changes(OLD, noisy)[1]) == 1
    noisy["group", "a"] = (1.3, 0.2)
    assert compare.changes(OLD, noisy)[1] == []


def test_the_command_fails_where_something_got_slower(tmp_path):
    rows = compare.times(list(compare.csv.DictReader(compare.RESULTS.open())))
    slowed = next(iter(rows))

    def run(factor):
        benchmarks = [
            {
                "group": group,
                "name": name,
                "params": {"method": name},
                "stats": {"median": median / 1e3 * (factor if (group, name) == slowed else 1), "iqr": 0.0, "rounds": 5},
            }
            for (group, name), (median, _) in rows.items()
        ]
        about = {"machine_info": {"cpu": {"brand_raw": "any"}}, "commit_info": {"id": "0" * 40}}
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**about, "benchmarks": benchmarks}))
        command = [sys.executable, "-m", "bench.compare", str(path)]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)

    assert run(1.0).returncode == 0
    slower = run(4.0)
    assert slower.returncode == 1
    assert f"slower 4.00x  {slowed[0]}: {slowed[1]}" in slower.stdout
