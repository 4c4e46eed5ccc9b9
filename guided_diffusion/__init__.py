"""Guided diffusion: train, guide, sample and score image diffusion models."""
