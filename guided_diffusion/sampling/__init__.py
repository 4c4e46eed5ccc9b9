"""Noise -> files: images by seed, sharded over processes, resumable; npz and png."""
