"""lorajob: a language model fine-tuned as one batch job, proven to work."""

__version__ = "0.1.0"
