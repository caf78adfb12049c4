"""The training job: a GPT on real text, with tensor, pipeline and data parallelism."""
