"""Cluster engine: arrivals, departures, failures over weeks; between events an instance jumps by whole iterations."""
