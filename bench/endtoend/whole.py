"""The whole job: gradients of a training set and of 16 queries out of it, a Fisher matrix per layer, and the scores.

python -m bench.endtoend.whole [gpt | wide]     # ten minutes; make test-interop builds the peers' environments

gpt: 128 passages, 16 linears of a small GPT, 64 x 64 numbers each: fewer samples than numbers. wide: 10,000 samples and
16 layers of as many numbers. Damping 0.1 of the mean of the diagonal, or what a toolkit makes of 0.1; each in a process
of its own, one thread, CPU seconds. Writes bench/results/whole.csv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bench.files import read_rows, write_rows

from .contenders import bergson_collector, dattri_attributor, make_compressor
from .models import Case, gpt, wide
from .worker import ONE_THREAD

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "whole.csv"
FIELDS = ("case", "contender", "extraction_s", "rest_s", "whole_s", "times_ours", "commit")
QUERIES = 16
BATCH = {"gpt": 16, "wide": 500}  # LogIX takes more than 24 GB for the wide job in batches of 16
Times = tuple[float, float]  # CPU seconds of the extraction, and of the rest


def dropinf_job(case: Case) -> Times:
    import dropinf

    compressor = make_compressor(case, "Dropout", group=16)
    start = time.process_time()
    train = compressor.compress(batches(case))
    query = compressor.compress([queries(case)])
    done = time.process_time()
    scores = dropinf.score(query, train, dropinf.build_fisher(train, "block", 0.1))
    return check(scores.T, done - start, time.process_time() - done)


def dattri_job(case: Case) -> Times:
    attributor = dattri_attributor(case, "random_mask", hessian="eFIM", damping=0.1)
    collected = [0.0]
    compute = attributor.compute_preconditioners

    def preconditioners(*args: Any, **options: Any) -> Any:
        collected[0] = time.process_time()
        return compute(*args, **options)

    attributor.compute_preconditioners = preconditioners
    train, query = (DataLoader(TensorDataset(*batch), BATCH[case.name]) for batch in (case.batch, queries(case)))
    start = time.process_time()
    attributor.cache(train)
    scores = attributor.attribute(train, query)
    return check(scores, collected[0] - start, time.process_time() - collected[0])


def logix_job(case: Case) -> Times:
    import logix
    from logix.config import LoRAConfig

    run = logix.LogIX(tempfile.mkdtemp())
    run.watch(case.model, name_filter=list(case.linears))
    run.add_lora(lora_config=LoRAConfig(rank=case.dim))
    start = time.process_time()
    for _ in logix.LogIXScheduler(run, lora="none", hessian="raw", save="grad"):
        for n, batch in enumerate(batches(case)):
            with run(data_id=[str(n * BATCH[case.name] + i) for i in range(len(batch[0]))]):
                case.loss_fn(case.model, batch).sum().backward()
                case.model.zero_grad()
    done = time.process_time()
    run.finalize()
    run.eval()
    run.setup({"grad": ["log"]})
    with run(data_id=[f"q{i}" for i in range(QUERIES)]):
        case.loss_fn(case.model, queries(case)).sum().backward()
    found = run.compute_influence_all(run.get_log(copy=True), run.build_log_dataloader())
    order = torch.tensor([int(i) for i in found["tgt_ids"]]).argsort()
    return check(found["influence"][:, order].T, done - start, time.process_time() - done)


def bergson_job(case: Case) -> Times:
    from bergson.hessians.preconditioner import DensePreconditioner

    start = time.process_time()
    eigen = sys.modules["bergson.collector.in_memory_collector"]
    finish, collected = eigen.process_autocorrelation_matrices, [0.0]

    def process(*args: Any, **options: Any) -> Any:
        collected[0] = time.process_time()
        return finish(*args, **options)

    eigen.process_autocorrelation_matrices = process  # type: ignore[attr-defined]
    train = bergson_collector(case, skip_hessians=False)(case.batch)
    query = bergson_collector(case)(queries(case))
    preconditioner = DensePreconditioner.from_processor(train.processor)
    whitened = preconditioner.apply(query.gradients)
    scores = sum(train.gradients[name] @ rows.T for name, rows in whitened.items())
    return check(scores, collected[0] - start, time.process_time() - collected[0])


def batches(case: Case) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(BATCH[case.name]) for x in case.batch), strict=True))


def queries(case: Case) -> tuple[Tensor, Tensor]:
    return case.batch[0][:QUERIES], case.batch[1][:QUERIES]


def check(scores: Any, extraction: float, rest: float) -> Times:
    """The scores [N, Q]: a query, which is a training sample, is among its own best hundredth."""
    assert scores.shape[1] == QUERIES
    own = scores.diagonal()
    assert ((scores > own).float().mean(0) < 0.01).float().mean() > 0.9
    return extraction, rest


JOBS: dict[str, tuple[Callable[[Case], Times], str]] = {
    "dropinf, mask in runs of 16": (dropinf_job, ""),
    "LogIX, LoGra": (logix_job, "logix"),
    "dattri, mask": (dattri_job, "dattri"),
    "bergson, Rademacher factors": (bergson_job, "bergson"),
}
MODELS = {"gpt": gpt, "wide": wide}  # bergson reads token ids alone


def worker(case: str, name: str) -> None:
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what toolkits print goes to stderr
    print(json.dumps(JOBS[name][0](MODELS[case]())), file=out, flush=True)


def measure(case: str, commit: str) -> list[dict[str, str]]:
    from tests.interop.run import environment

    rows: list[dict[str, str]] = []
    for name, (_, where) in JOBS.items():
        if case == "wide" and where == "bergson":
            continue
        python = str(environment(where)) if where else sys.executable
        command = [python, "-m", "bench.endtoend.whole", case, name]
        settings = {**os.environ, **ONE_THREAD}
        done = subprocess.run(command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, check=True, text=True)
        extraction, rest = json.loads(done.stdout)
        whole = extraction + rest
        ours = whole if not rows else float(rows[0]["whole_s"])
        found = {"extraction_s": extraction, "rest_s": rest, "whole_s": whole, "times_ours": whole / ours}
        rows.append({"case": case, "contender": name, "commit": commit, **{k: f"{x:.4g}" for k, x in found.items()}})
        print(rows[-1], flush=True)
    return rows


def main(cases: list[str]) -> None:
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    rows = read_rows(RESULTS)
    for case in cases:
        rows = [row for row in rows if row["case"] != case] + measure(case, commit)
        write_rows(RESULTS, FIELDS, rows)


if __name__ == "__main__":
    worker(*sys.argv[1:]) if len(sys.argv) == 3 else main(sys.argv[1:] or list(MODELS))
