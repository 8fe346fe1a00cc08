"""Readers of data set lengths, workload files, cluster files and job traces."""
