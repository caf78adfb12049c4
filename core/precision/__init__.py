"""Rounding of numbers to the precision in which they are stored."""
