"""Megatron-Core's optimizers and these, case by case."""
