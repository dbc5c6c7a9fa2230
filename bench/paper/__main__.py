"""Run all that is missing: python -m bench.paper [EXPERIMENT ...]"""

from __future__ import annotations

import argparse

import torch

from . import mislabelled, removal, selection, sources

_ALL = (removal, selection, sources, mislabelled)
EXPERIMENTS = {found.EXPERIMENT: (found.run, found.SEEDS) for found in _ALL}


def main() -> None:
    """Run the named experiments, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    named = parser.parse_args().experiments
    unknown = sorted(set(named) - EXPERIMENTS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    torch.set_num_threads(1)
    for seed in range(max(seeds for _, seeds in EXPERIMENTS.values())):
        for name in named or EXPERIMENTS:
            run, seeds = EXPERIMENTS[name]
            if seed < seeds:
                run(seed)


if __name__ == "__main__":
    main()
