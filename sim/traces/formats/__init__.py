"""Formats of job traces: one reader a file, the file name is the key."""
