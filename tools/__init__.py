"""The jobs and measurements around the library, each run as ``python -m tools.<name>``."""
