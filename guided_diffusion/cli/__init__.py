"""Flags to runs."""
