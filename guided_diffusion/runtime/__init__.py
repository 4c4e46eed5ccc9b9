"""The world outside: processes, files, logs, random streams."""
