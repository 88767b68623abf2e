"""Tests for a machine with a GPU: `python3 -m pytest tests/gpu`, or, without pytest,
`python3 -m tests.gpu.run`."""
