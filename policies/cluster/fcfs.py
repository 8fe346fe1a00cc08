"""fcfs: first come, first served; each job on the emptiest instance (MuxTune §5.4)."""

from __future__ import annotations

from muxtune.policies.cluster.base import ClusterPolicy


class Fcfs(ClusterPolicy):
    """First come, first served."""
