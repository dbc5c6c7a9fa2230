"""Recorded runs: how true their scores are, and what recording costs."""
