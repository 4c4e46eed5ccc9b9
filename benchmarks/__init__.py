"""Measurements on the machine at hand, each as a ratio of two things timed in one run: `python -m benchmarks`."""
