"""Optimizers as functions of dicts of tensors, with builders, wrappers and steps for pipeline stages."""
