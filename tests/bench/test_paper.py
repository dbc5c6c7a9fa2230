"""The paper's table: seeds become a mean and its lowest and highest, and what was refused stays visible."""

from __future__ import annotations

from bench.paper import rows


def test_seeds_are_gathered_and_refusals_keep_their_row() -> None:
    def row(seed: int, method: str, measure: str, value: str, seconds: str) -> rows.Row:
        found = ("removal", "10 %", str(seed), method, measure, value, seconds)
        return dict(zip(rows.EACH_FIELDS, found, strict=True))

    each = [row(0, "a", "accuracy", "0.5", "1.0"), row(0, "b", "refused", "nan", "nan")]
    each += [row(1, "a", "accuracy", "0.8", "3.0"), row(2, "a", "accuracy", "0.8", "2.0")]
    first, second = rows.over_seeds(each)
    assert (first["value"], first["low"], first["high"], first["n"]) == ("0.7000", "0.5000", "0.8000", "3")
    assert first["compress_s"] == "2.0"
    assert (second["method"], second["measure"], second["value"], second["n"]) == ("b", "refused", "", "1")
