"""Passages of the Brown corpus as JSON lines {"id", "text", "genre"}, as `dropinf index --data` reads them: the first
words of every text, a passage a text.

python -m bench.fidelity.passages_jsonl out/brown.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.files import replacing

from . import data

GENRES = {
    "a": "press: reportage", "b": "press: editorial", "c": "press: reviews", "d": "religion", "e": "skills and hobbies",
    "f": "popular lore", "g": "belles lettres", "h": "government", "j": "learned", "k": "fiction", "l": "mystery",
    "m": "science fiction", "n": "adventure", "p": "romance", "r": "humor",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--words", type=int, default=90, help="of a passage")
    parser.add_argument("--each", type=int, default=1, help="passages of a text, spread over it")
    options = parser.parse_args()
    lines = []
    for name, words in sorted(data.brown_words().items()):
        for i in range(options.each):
            start = i * (len(words) // options.each)
            text = " ".join(words[start : start + options.words])
            lines.append({"id": f"{name}-{i}", "text": text, "genre": GENRES[name[1]]})
    with replacing(options.path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{options.path}: {len(lines)} passages")


if __name__ == "__main__":
    main()
