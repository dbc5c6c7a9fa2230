"""A batch in, compressed gradients out."""
