"""Benchmarks: the step of these optimizers beside those of other packages."""
