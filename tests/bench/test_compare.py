"""The comparison of benchmark runs: a slower machine is no change, a slower benchmark is one, noise is none."""

from __future__ import annotations

import json
import sys

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


def test_the_command_fails_where_something_got_slower(tmp_path, monkeypatch, capsys):
    def run(factor, *options):
        benchmarks = [
            {
                "group": group,
                "name": f"test[{name}]",
                "params": {"method": name},
                "stats": {"median": median * (factor if name == "d" else 1), "iqr": 0.0, "rounds": 5},
            }
            for (group, name), (median, _) in OLD.items()
        ]
        about = {"machine_info": {"cpu": {"brand_raw": "any"}}, "commit_info": {"id": "0" * 40}}
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**about, "benchmarks": benchmarks}))
        monkeypatch.setattr(sys, "argv", ["compare", str(path), *options])
        compare.main()

    monkeypatch.setattr(compare, "RESULTS", tmp_path / "ops.csv")
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    run(1.0, "--write")
    with pytest.raises(SystemExit) as ended:
        run(1.0)
    assert not ended.value.code
    assert "nothing changed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run(4.0)
    assert ended.value.code
    assert "slower 4.00x  group: d" in capsys.readouterr().out
