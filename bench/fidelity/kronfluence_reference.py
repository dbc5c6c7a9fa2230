"""kronfluence's scores as a reference: what its EK-FAC says of a task's queries, beside dropinf's uncompressed EK-FAC.

make test-interop && .venv-interop/kronfluence/bin/python -m bench.fidelity.kronfluence_reference mlp-fashion
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import kronfluence
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import dropinf
from bench.files import read_rows, write_rows
from dropinf.interop.kronfluence import Plan, prepare_model
from dropinf.workload import LossFn

from .evaluate import CALIBRATION, FIELDS, MODELS, RESULTS, compressed, evaluate
from .retrain import losses_of
from .tasks import NAMES, task

METHOD = "kronfluence's EK-FAC"


def pairwise_scores(
    model: nn.Module,
    loss_fn: LossFn,
    train: Dataset[Any] | Sequence[Tensor],
    query: Dataset[Any] | Sequence[Tensor],
    *,
    strategy: Literal["identity", "diagonal", "kfac", "ekfac"] = "ekfac",
    damping: float | None = None,
    sketch: Plan | None = None,
    batch_size: int = 32,
) -> Tensor:
    """kronfluence's scores [Q, N], under the empirical Fisher matrix; positive: training on n lowers the query's loss.

    Args:
        loss_fn: `(model, batch) -> losses [n]`, as dropinf takes it.
        train: a dataset, or the tensors of one; `query` likewise.
        damping: added to the eigenvalues; None: 0.1 of their mean in each module, which is dropinf's `damping=0.1`.
        sketch: as `prepare_model` takes it; None: whole gradients.

    The model is copied. Its dtype, at least float32, is that of every step.
    """

    class Losses(kronfluence.Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:  # noqa: ARG002
            return loss_fn(model, batch).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return loss_fn(model, batch).sum()

    model, task = copy.deepcopy(model), Losses()
    first = next(model.parameters())
    dtype = torch.promote_types(first.dtype, torch.float32)
    model = kronfluence.prepare_model(model, task) if sketch is None else prepare_model(model, task, sketch)
    factor_args = kronfluence.FactorArguments(
        strategy=strategy, use_empirical_fisher=True, covariance_max_examples=None, lambda_max_examples=None
    )
    score_args = kronfluence.ScoreArguments(damping_factor=damping)
    for arguments in (factor_args, score_args):
        for name in vars(arguments):
            if name.endswith("_dtype") and name not in ("amp_dtype", "eigendecomposition_dtype"):
                setattr(arguments, name, dtype)
    train, query = (TensorDataset(*data) if isinstance(data, list | tuple) else data for data in (train, query))
    with tempfile.TemporaryDirectory() as folder:
        options = {"cpu": first.device.type == "cpu", "disable_tqdm": True, "output_dir": folder}
        analyzer = kronfluence.Analyzer("dropinf", model, task, **options)
        analyzer.fit_all_factors("factors", train, per_device_batch_size=batch_size, factor_args=factor_args)
        batches = {"per_device_query_batch_size": batch_size, "per_device_train_batch_size": batch_size}
        analyzer.compute_pairwise_scores("scores", "factors", query, train, **batches, score_args=score_args)
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=NAMES)
    found = task(parser.parse_args().task)
    torch.set_num_threads(1)
    theirs, ours, seconds = [], [], []
    for seed in range(MODELS):
        model = found.fit(torch.ones(len(found.train[0]), dtype=torch.bool), seed)
        start = time.perf_counter()
        theirs.append(pairwise_scores(model, found.loss_fn, found.train, found.query))
        seconds.append(time.perf_counter() - start)
        whole = compressed(found, model, "uncompressed", 0, 0)
        fisher = dropinf.build_fisher(whole.train, "kronecker", 0.1)
        ours.append(dropinf.score(whole.query, whole.train, fisher))
    subsets, by_seed = losses_of(found.name)
    scores, reference = torch.stack(theirs).mean(0), torch.stack(ours).mean(0)
    rows = evaluate({("ek-fac", 0.1): scores}, by_seed.mean(1), subsets, reference)
    about: dict[str, object] = {"task": found.name, "method": METHOD, "models": MODELS, "calibration": CALIBRATION}
    about |= {"subsets": len(subsets), "seeds": by_seed.shape[1]}
    path = RESULTS / f"{found.name}.csv"
    others = [row for row in read_rows(path) if row["method"] != METHOD]
    write_rows(path, FIELDS, [*others, *(about | row for row in rows)])
    print(f"{min(seconds):.1f} s a model, factors and scores", rows)


if __name__ == "__main__":
    main()
