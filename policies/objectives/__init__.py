"""Objectives: what a plan is judged by. One file an objective; its file name is its key."""
