"""Runnable examples: one call of ``get_optimizer`` in other people's training loops."""
