"""What surrounds the computation: processes and devices, files, logs, signals, random streams."""
