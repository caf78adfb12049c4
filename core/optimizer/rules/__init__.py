"""The rules of the optimizers, one family per file, each written like its paper. No rule communicates by itself."""
