"""Training runs that are recorded: each sample's part of every step's gradient, and what the steps did with it."""

from .recording import Recording, record
from .run import Run
from .tracing import score_run

__all__ = ["Recording", "Run", "record", "score_run"]
