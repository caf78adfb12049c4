"""Optimizers as functions of dicts of tensors, and what is built of them."""
