"""The rules of the optimizers: one family a file, each written like its paper. None of them communicates."""
