"""Optimizers for sharded models: every step is the unsharded step."""
