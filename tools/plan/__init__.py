"""Predicts what an optimizer step costs on a cluster."""
