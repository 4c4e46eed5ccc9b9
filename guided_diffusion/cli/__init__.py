"""The command line: one module per command, from flags to a run."""
