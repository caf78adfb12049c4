"""Inspect, verify, compare, reshard and convert checkpoints."""
