"""The demo: find flipped labels in handwritten digits with five compressions of the same gradients."""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

import dropinf

from . import report

Batch = tuple[Tensor, Tensor]
RECOMMENDED = "dropout, recommended"  # rotated and whitened


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo; one damping and one dim serve every method, so that none is favoured."""

    seed: int = 0
    train_size: int = 1200
    flip_fraction: float = 0.1
    epochs: int = 12
    batch_size: int = 100
    dim: int = 16
    damping: float = 0.1
    repeats: int = 3


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` in `[0, 1]`; `given` are the training labels after flipping, `true` before."""

    images: Tensor
    given: Tensor
    true: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def flipped(self) -> Tensor:
        """Bool `[N]`: which training labels are wrong."""
        return self.given != self.true


@dataclass(frozen=True)
class Attribution:
    """What one method found: `self_influence` `[N]`, `scores` `[Q, N]`, and what it cost."""

    seconds: float
    bytes_per_sample: int
    self_influence: Tensor
    scores: Tensor


@dataclass(frozen=True)
class DemoResult:
    """Everything that the table, the JSON file and the report show."""

    config: DemoConfig
    data: Digits
    predictions: Tensor
    train_losses: Tensor
    methods: dict[str, Attribution]
    seconds: float

    @property
    def test_accuracy(self) -> float:
        """Share of the test images that the model gets right."""
        return float((self.predictions == self.data.test_labels).double().mean())

    def auc(self, method: str) -> float:
        """Return the ROC AUC of finding the flipped labels by the self-influence of `method`."""
        return float(roc_auc_score(self.data.flipped, self.methods[method].self_influence))

    @property
    def loss_auc(self) -> float:
        """ROC AUC of finding the flipped labels by the training loss alone: the bar that influence has to clear."""
        return float(roc_auc_score(self.data.flipped, self.train_losses))

    def correlation(self, method: str) -> float:
        """Return Spearman's correlation with the uncompressed scores over training images, mean over queries."""
        return rank_correlation(self.methods[method].scores, self.methods["uncompressed"].scores)

    def ratio(self, method: str) -> float:
        """Return how many times smaller a gradient of `method` is than an uncompressed one."""
        return self.methods["uncompressed"].bytes_per_sample / self.methods[method].bytes_per_sample


def load_data(config: DemoConfig) -> Digits:
    """Shuffle scikit-learn's digits, split them, and flip training labels, each to another class."""
    generator = torch.Generator().manual_seed(config.seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float()[order].unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()[order]
    n, flips = config.train_size, round(config.train_size * config.flip_fraction)
    given = labels[:n].clone()
    chosen = torch.randperm(n, generator=generator)[:flips]
    given[chosen] = (given[chosen] + torch.randint(1, 10, (flips,), generator=generator)) % 10
    return Digits(images[:n], given, labels[:n], images[n:], labels[n:])


def build_model() -> nn.Module:
    """Return an untrained CNN of 8,746 parameters for 8x8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each sample, `[N]`."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def train_model(config: DemoConfig, data: Digits, progress: Progress) -> nn.Module:
    """Train on the given labels, flipped ones included; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in progress.track(range(config.epochs), description="train the model"):
        for rows in torch.randperm(len(data.given), generator=generator).split(config.batch_size):
            optimizer.zero_grad()
            sample_loss(model, (data.images[rows], data.given[rows])).mean().backward()
            optimizer.step()
    return model.eval()


def sketches(config: DemoConfig) -> dict[str, dropinf.Sketch]:
    """Return the five compressions by their name in the results; the first is the recommended one."""
    dim = config.dim
    return {
        RECOMMENDED: dropinf.Dropout(dim=dim, rank=4 * dim, whiten=True, seed=config.seed),
        "dropout": dropinf.Dropout(dim=dim, seed=config.seed),
        "gaussian": dropinf.Gaussian(dim=dim, seed=config.seed),
        "pca": dropinf.PCA(dim=dim, seed=config.seed),
        "uncompressed": dropinf.Identity(),
    }


def make_batches(config: DemoConfig, images: Tensor, labels: Tensor) -> list[Batch]:
    """Cut images and labels into batches."""
    return list(zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True))


def compress(
    model: nn.Module, sketch: dropinf.Sketch, batches: list[Batch]
) -> tuple[dropinf.Compressor, dropinf.Gradients]:
    """Compress the batches with a fresh compressor."""
    compressor = dropinf.Compressor(model, sketch, sample_loss)
    compressor.calibrate(batches)  # does nothing unless the sketch needs it
    return compressor, compressor.compress(batches)


def attribute(model: nn.Module, sketch: dropinf.Sketch, config: DemoConfig, data: Digits) -> Attribution:
    """Compress the training set, build the Fisher, score every test image; seconds are those of compressing."""
    batches = make_batches(config, data.images, data.given)
    # The first call of a process pays for set-up, which would be charged to whichever method comes first.
    compress(model, sketch, batches[:1])
    times = []
    for _ in range(config.repeats):
        start = time.perf_counter()
        compressor, train = compress(model, sketch, batches)
        times.append(time.perf_counter() - start)
    query = compressor.compress(make_batches(config, data.test_images, data.test_labels))
    fisher = dropinf.build_fisher(train, kind="block", damping=config.damping)
    scores, noisy = dropinf.score(query, train, fisher), dropinf.self_influence(train, fisher)
    return Attribution(statistics.median(times), train.bytes_per_sample, noisy, scores)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of the rows of `a` with those of `b`, each `[Q, N]`, averaged over rows."""
    ranks = torch.stack([x.argsort(1).argsort(1).double() for x in (a, b)])
    unit = F.normalize(ranks - ranks.mean(-1, keepdim=True), dim=-1)
    return float((unit[0] * unit[1]).sum(-1).mean())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: layers this small lose more to waiting threads than they gain, 40x on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def analyse(config: DemoConfig, console: Console) -> DemoResult:
    """Train the model and run every method, under a progress bar."""
    start = time.perf_counter()
    data = load_data(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with one_thread(), Progress(*columns, console=console) as progress:
        model = train_model(config, data, progress)
        with torch.no_grad():
            predictions = model(data.test_images).argmax(1)
            losses = sample_loss(model, (data.images, data.given))
        methods = {}
        for name, sketch in progress.track(sketches(config).items(), description="compress, Fisher, score"):
            methods[name] = attribute(model, sketch, config, data)
    return DemoResult(config, data, predictions, losses, methods, time.perf_counter() - start)


def run_demo(config: DemoConfig, out: Path) -> DemoResult:
    """Run everything, print the table, and write `result.json` and `report.html` to `out`."""
    console = Console()
    result = analyse(config, console)
    table = Table(title="Finding the flipped labels by self-influence")
    header, *rows = table_rows(result)
    for position, name in enumerate(header):
        table.add_column(name, justify="right" if position else "left", no_wrap=not position)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    summary = json.dumps(to_json(result), indent=2) + "\n"
    for name, text in (("result.json", summary), ("report.html", to_html(result))):
        report.write_text(out / name, text)
        console.print(f"wrote {out / name}", soft_wrap=True)
    return result


def table_rows(result: DemoResult) -> list[list[str]]:
    """Return the header and one row a method, as text."""
    names = "method, mislabel AUC, seconds to compress, bytes per sample, times smaller, score agreement"
    rows = [names.split(", ")]
    for name, method in result.methods.items():
        cells = [f"{result.auc(name):.3f}", f"{method.seconds:.2f}", f"{method.bytes_per_sample:,}"]
        rows.append([name, *cells, f"{result.ratio(name):.1f}", f"{result.correlation(name):.2f}"])
    return rows


def to_json(result: DemoResult) -> dict[str, object]:
    """Return what `result.json` holds."""
    methods = result.methods
    return {
        **asdict(result.config),
        "samples": len(result.data.given),
        "flipped": int(result.data.flipped.sum()),
        "test_accuracy": result.test_accuracy,
        "mislabel_auc": {name: result.auc(name) for name in methods},
        "loss_auc": result.loss_auc,
        "score_correlation": {name: result.correlation(name) for name in methods},
        "seconds": {**{name: m.seconds for name, m in methods.items()}, "total": result.seconds},
        "bytes_per_sample": {name: m.bytes_per_sample for name, m in methods.items()},
        "versions": {"torch": torch.__version__, "dropinf": dropinf.__version__},
    }


def to_html(result: DemoResult) -> str:
    """Return the report: table, ROC, the most harmful training images, and the causes of some predictions."""
    data = result.data
    train = report.LabelledImages(data.images[:, 0].numpy(), data.given.tolist(), data.true.tolist())
    size = result.methods[RECOMMENDED].bytes_per_sample
    headline = (
        f"From {size:,} bytes per training image, dropout finds {int(data.flipped.sum())} flipped labels among "
        f"{len(data.given):,} digits with an AUC of {result.auc(RECOMMENDED):.3f} "
        f"({result.auc('uncompressed'):.3f} from gradients {result.ratio(RECOMMENDED):.0f} times larger)"
    )
    reproduce = f"<pre>dropinf demo --seed {result.config.seed}\n# make demo: sets up, then seed 0</pre>"
    return report.page(
        "dropinf demo",
        headline,
        [
            comparison(result),
            roc(result),
            harmful(result, train),
            report.section(
                "Why the model says so",
                query_blocks(result, train),
                "Test images with the training images that lowered their loss most, and those that raised it most, "
                "by dropout's scores.",
            ),
            report.section("Reproduce", reproduce, f"{result.seconds:.0f} seconds in all, on a CPU."),
        ],
    )


def comparison(result: DemoResult) -> str:
    """Return the section with the table of methods and what its columns mean."""
    config = result.config
    header, *rows = table_rows(result)
    lead = (
        f"A small CNN, test accuracy {result.test_accuracy:.1%}, was trained on labels of which "
        f"{config.flip_fraction:.0%} are wrong. One size ({config.dim} per axis) and one damping ({config.damping}) "
        f"serve every method; neither was tuned. Seconds are medians of {config.repeats} passes on one thread, "
        "calibration included; the recommended dropout rotates and whitens what it keeps. Score agreement is "
        "Spearman's correlation with the uncompressed scores of the images, averaged over the test images: it tells "
        "methods apart where the AUC no longer does."
    )
    return report.section("Five compressions of the same gradients", report.table(header, rows, RECOMMENDED), lead)


def roc(result: DemoResult) -> str:
    """Return the section with the ROC of finding the flipped labels."""
    curves = {}
    for name, method in result.methods.items():
        false_rate, true_rate, _ = roc_curve(result.data.flipped.numpy(), method.self_influence.numpy())
        curves[f"{name} ({result.auc(name):.3f})"] = (false_rate, true_rate)
    lead = (
        "Images in order of self-influence; a reviewer who reads from the top meets the wrong labels first. The axis "
        "ends at 0.2, the AUC is of the whole curve. The task is easy: the training loss alone reaches "
        f"{result.loss_auc:.3f}. It shows what survives compression, not that influence beats loss."
    )
    return report.section("Finding the flipped labels", report.roc_plot(curves, max_rate=0.2), lead)


def harmful(result: DemoResult, train: report.LabelledImages) -> str:
    """Return the section with the training images that raised the loss of the whole test set most."""
    on_test = result.methods[RECOMMENDED].scores.sum(0)
    worst = on_test.argsort(stable=True)[:24]
    lead = (
        "Their influence by dropout's scores, summed over all test images, raises the test loss most. "
        f"{int(result.data.flipped[worst].sum())} of these {len(worst)} carry a flipped label."
    )
    return report.section(
        "The most harmful training images", report.image_grid(train, worst.tolist(), on_test.numpy()), lead
    )


def query_blocks(result: DemoResult, train: report.LabelledImages) -> str:
    """Return the blocks of up to three test images that the model gets wrong, and of three that it gets right."""
    data = result.data
    wrong = result.predictions != data.test_labels
    chosen = [*wrong.nonzero().flatten()[:3].tolist(), *(~wrong).nonzero().flatten()[:3].tolist()]
    queries = report.LabelledImages(data.test_images[:, 0].numpy(), data.test_labels.tolist())
    scores = result.methods[RECOMMENDED].scores
    return "".join(
        report.query_block(queries, q, train, scores[q].numpy(), note=f"predicted {int(result.predictions[q])}")
        for q in chosen
    )
