"""The demo: flipped labels in real handwritten digits."""
