"""What recording adds to a training step: processes of a plain loop, a recorded one and dattri-llm's hooks, in turns.

python -m bench.recording.cost [CASE ...]    # make test-interop builds dattri-llm's environment

Rows go to bench/results/recording_cost.csv: medians of CPU seconds, and of their ratio to the plain step of a round,
and MB that torch held of a step at most. Pages that are freed stay with a process, as in bench.endtoend. Steps are
timed between proofs: the 4th, 16th, 64th, ... forward is proven again, for about two steps more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.endtoend import models
from bench.endtoend.contenders import Contender, Job, Unfit
from bench.endtoend.models import Case
from bench.endtoend.turns import Worker
from bench.files import processor, read_rows, write_rows

TABLE = Path("bench/results/recording_cost.csv")
FIELDS = ("case", "contender", "seconds", "over_plain", "peak_mb", "peak_over_plain", "rounds", "cpu")
LARGE = "smollm2"  # in the names of cases whose steps take long
GROUP = 8  # columns side by side: a gather then reads few cache lines
KEPT = {"lm_head*": 8, "*embed*": 8, "tokens": 8, "*lora*": 4}  # of each axis; of others, half the case's ``dim``


def narrow() -> Case:
    """The GPT of bench.endtoend at half its width."""
    torch.manual_seed(0)
    ids = torch.randint(2048, (2, 128, 128))
    names = tuple(f"blocks.{i}.{name}" for i in range(4) for name in ("qkv", "out", "up", "down"))
    return Case("gpt128", models.GPT(2048, 128, 128, 4, 4), (ids[0], ids[1]), models.next_word, names, 32)


def gpt() -> Case:
    """The GPT of bench.endtoend, of which 16 x 16 numbers a layer are recorded."""
    case = models.gpt()
    return Case("gpt256", case.model, case.batch, case.loss_fn, case.linears, 32)


def smollm2() -> Case:
    """The SmolLM2 of bench.endtoend, of which 8 x 8 numbers a layer are recorded."""
    case = models.smollm2()
    return Case("smollm2", case.model, case.batch, case.loss_fn, case.linears, 16)


def lora() -> Case:
    """SmolLM2's shape with LoRA of rank 8 on all linears."""
    from peft import LoraConfig, get_peft_model

    case = smollm2()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(case.model, LoraConfig(r=8, target_modules=targets, lora_dropout=0.0))  # type: ignore[arg-type]
    names = tuple(f"{n}.default" for n, _ in model.named_modules() if n.endswith(("lora_A", "lora_B")))
    return Case("smollm2-lora", model, case.batch, case.loss_fn, names, 8)


CASES: dict[str, Callable[[], Case]] = {
    "gpt256": gpt,
    "gpt128": narrow,
    "resnet9": models.resnet9,
    "smollm2": smollm2,
    "smollm2-lora": lora,
}


def _loop(case: Case) -> tuple[torch.optim.Optimizer, Job]:
    """Make an optimizer of a case, and what a step of its plain loop does."""
    model = case.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        case.loss_fn(model, case.batch).mean().backward()
        optimizer.step()

    return optimizer, step


def begun(case: Case, job: Job) -> Job:
    """Make the steps that are proven; none of the next 11, or 47, is."""
    for _ in range(4 if LARGE in case.name else 16):
        job()
    return job


def plain(case: Case) -> Job:
    _, step = _loop(case)
    return begun(case, step)


def recorded(case: Case) -> Job:
    import dropinf

    optimizer, step = _loop(case)
    sketch = dropinf.Dropout({**KEPT, "*": case.dim // 2}, group=GROUP)
    run = dropinf.record(case.model, sketch, optimizer, out=tempfile.mkdtemp()).__enter__()

    def job() -> None:
        run.samples(range(case.samples))
        step()

    return begun(case, job)


def dattri_llm(case: Case) -> Job:
    """Its hooks, with a mask of the linears' inputs and output gradients, as `bench.endtoend` has them."""
    from dattri_llm import HookManager, HookManagerConfig

    modules = dict(case.model.named_modules())
    if not all(isinstance(modules[name], torch.nn.Linear) for name in case.linears):
        raise Unfit("dattri-llm's capture-time projection compresses linear layers alone")
    k = case.dim // 2
    config = HookManagerConfig(
        hook_types=dict.fromkeys(case.linears, "linear_io"),
        capture_style="materialized",
        projection_kwargs={"__default__": {"style": "mask", "proj_dim": k * (k + 1)}},
    )
    manager = HookManager(case.model, config=config)
    optimizer, _ = _loop(case)

    def job() -> Any:
        optimizer.zero_grad()
        with manager.collect():
            case.loss_fn(case.model, case.batch).mean().backward()
            rows = manager.get_gradient().data
        optimizer.step()
        return rows

    return begun(case, job)


PLAIN = "plain step"
CONTENDERS = {
    PLAIN: Contender(plain, package="torch"),
    "recorded step": Contender(recorded),
    "dattri-llm's hooks, mask": Contender(dattri_llm, "dattri_llm", "dattri-llm"),
}


def measured(case: str) -> list[dict[str, str]]:
    workers = [Worker(case, name, "bench.recording.cost") for name in CONTENDERS]
    fit = [worker for worker in workers if "unfit" not in worker.about]
    peaks = {worker.name: worker.ask("memory") for worker in fit}
    rounds = 4 if LARGE in case else 11
    for _ in range(rounds):
        for worker in fit:
            worker.seconds.append(worker.ask("time"))
    own = {worker.name: worker.seconds for worker in fit}
    rows = []
    for worker in workers:
        found = {"case": case, "contender": worker.name, "cpu": processor()}
        if worker in fit:
            ratio = statistics.median(a / b for a, b in zip(worker.seconds, own[PLAIN], strict=True))
            peak = peaks[worker.name]
            found |= {"seconds": f"{statistics.median(worker.seconds):.3f}", "over_plain": f"{ratio:.3f}"}
            found |= {"peak_mb": f"{peak:.0f}", "peak_over_plain": f"{peak / peaks[PLAIN]:.3f}", "rounds": str(rounds)}
        else:
            found["seconds"] = str(worker.about["unfit"])
        worker.close()
        rows.append(found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    rows = read_rows(TABLE)
    for case in parser.parse_args().cases:
        found = measured(case)
        print(*found, sep="\n", flush=True)
        rows = [r for r in rows if r["case"] != case] + found
        write_rows(TABLE, FIELDS, rows)


if __name__ == "__main__":
    main()
