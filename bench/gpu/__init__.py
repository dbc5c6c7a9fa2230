"""What a GPU measures: ``python -m bench.gpu OUT``, then ``python -m bench.gpu.report OUT``."""
