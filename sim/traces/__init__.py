"""Readers of data set lengths, workload files and cluster files."""
