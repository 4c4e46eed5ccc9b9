"""Detours around slow operators, and what decides between them: callers name the operation and say nothing of devices."""
