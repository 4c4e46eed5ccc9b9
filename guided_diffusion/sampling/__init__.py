"""Sampling: images by seed, divided over processes, resumable, written as npz and png."""
