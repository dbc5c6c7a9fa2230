"""Influence functions on dropout-compressed per-sample gradients, for any PyTorch module."""

from torch.serialization import add_safe_globals

from . import measure
from .budget import Choice, choose
from .capture.ladder import AttributionError
from .capture.layer import Layer
from .checkpoints import Checkpoints
from .compressor import Compressor
from .directions import Direction, Refined, direction, refine, rerank, tokens
from .fisher import Fisher, build_fisher
from .fisher.bits import BitCode
from .fisher.blocks import DiagonalBlock
from .fisher.cholesky import Cholesky
from .fisher.damping import Damping
from .fisher.dense import DenseBlock
from .fisher.kronecker import KroneckerBlock
from .fisher.ledger import Ledger
from .gradients import Gradients, StepScores
from .index import Index
from .index.parts import Parts
from .one_call import compress
from .readonly import ReadOnly
from .recording import Recording, Run, record
from .score import TopK, score, self_influence
from .score_by import ScoreParts
from .select import Selection, select
from .sketch import PCA, SJLT, Axis, Dropout, Gaussian, Identity, Rademacher, Sketch

__version__ = "0.1.0"

__all__ = [
    "PCA",
    "SJLT",
    "AttributionError",
    "Axis",
    "BitCode",
    "Checkpoints",
    "Choice",
    "Compressor",
    "Direction",
    "Dropout",
    "Fisher",
    "Gaussian",
    "Gradients",
    "Identity",
    "Index",
    "Layer",
    "Parts",
    "Rademacher",
    "Recording",
    "Refined",
    "Run",
    "ScoreParts",
    "Selection",
    "Sketch",
    "StepScores",
    "TopK",
    "build_fisher",
    "choose",
    "compress",
    "direction",
    "measure",
    "record",
    "refine",
    "rerank",
    "score",
    "select",
    "self_influence",
    "tokens",
]

# What torch.load reads without weights_only=False: none of them runs code of the file's.
add_safe_globals([Axis, Fisher, Gradients, Layer, ReadOnly, ScoreParts, TopK])
add_safe_globals([Cholesky, Damping, DenseBlock, DiagonalBlock, KroneckerBlock, Ledger, slice])
