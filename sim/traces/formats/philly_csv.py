"""Philly's jobs as parsed by Pollux and Sia: timestamp, duration, num_gpus, gpu_time, cluster (Jeon et al., ATC'19)."""

from __future__ import annotations

from muxtune.sim.traces.formats.base import CsvFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row


class PhillyCsv(CsvFormat):
    """One line a job, in no order, without ids: `philly-` and the row's number from 0."""

    COLUMNS = ("timestamp", "duration", "num_gpus", "cluster")
    GIVES = frozenset({"tenant", "duration_ns", "gpus_milli"})
    NOTE = "timestamp is the submission, duration the execution in seconds, cluster (a virtual cluster) the tenant"
    EXAMPLE = (
        "timestamp,duration,num_gpus,gpu_time,cluster\n"
        "2020-01-01 00:00:30,60.0,1,60.0,blue\n"
        "2020-01-01 00:00:00,120.5,8,964.0,red\n"
        "2020-01-01 00:00:30,10.0,2,20.0,red\n"
    )
    SPOILT = (EXAMPLE + "2020-01-01 00:01:00,soon,2,20.0,red\n", "line 5", "duration")

    def record(self, row: Row) -> Record | str:
        """The job of a line."""
        return Record(
            job_id=f"philly-{row.number - 1}",
            submit_ns=row.submitted(row.instant_ns("timestamp"), "timestamp"),
            duration_ns=row.seconds_ns("duration"),
            gpus_milli=row.gpus_milli("num_gpus"),
            tenant=row.name("cluster"),
        )
