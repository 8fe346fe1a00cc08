"""Cluster policies: which job runs where and when, one file each."""
