"""Functions and classes that several rules share."""
