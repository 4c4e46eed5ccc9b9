"""Disk to batches."""
