"""Optimizers, their registry and configuration."""
