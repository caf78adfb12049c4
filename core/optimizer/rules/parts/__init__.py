"""Pieces that several rules share."""
