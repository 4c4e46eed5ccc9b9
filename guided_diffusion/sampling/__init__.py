"""Noise to files."""
