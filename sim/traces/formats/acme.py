"""Acme, Shanghai AI Lab's Seren and Kalos clusters (Hu et al., NSDI'24): trace_seren.csv, trace_kalos.csv."""

from __future__ import annotations

from muxtune.sim.traces.formats.base import CsvFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row


class Acme(CsvFormat):
    """One line a job; jobs that ask for no GPU are left out. Failed and cancelled ones count with the time that they ran."""

    COLUMNS = ("job_id", "user", "gpu_num", "submit_time", "duration")
    GIVES = frozenset({"tenant", "duration_ns", "gpus_milli"})
    NOTE = "duration is the execution in seconds whatever the final state, user the tenant"
    EXAMPLE = (
        "job_id,user,node_num,gpu_num,cpu_num,type,state,submit_time,start_time,end_time,duration,queue,gpu_time\n"
        "7,ua,1,8,128,Other,FAILED,2023-03-01 08:00:00+08:00,2023-03-01 08:00:30+08:00,2023-03-01 08:02:30+08:00,120,30,960.0\n"
        "8,ub,1,0,16,Other,COMPLETED,2023-03-01 00:00:00+00:00,,,60,0,0.0\n"
        "9,ub,2,16,256,SFT,COMPLETED,2023-03-01 00:01:00+00:00,,,3600,0,57600.0\n"
        "10,ua,1,1,16,Debug,CANCELLED,2023-02-28 23:59:00+00:00,,,5,0,5.0\n"
    )
    SPOILT = (EXAMPLE + "11,ua,1,1,16,Debug,CANCELLED,yesterday,,,5,0,5.0\n", "line 6", "submit_time")

    def record(self, row: Row) -> Record | str:
        """The job of a line, or why it is none."""
        submit_ns = row.submitted(row.instant_ns("submit_time"), "submit_time")
        gpus_milli = row.gpus_milli("gpu_num")
        duration_ns = row.seconds_ns("duration")
        if not gpus_milli:
            return "asks for no GPU"
        return Record(
            job_id=row.name("job_id"),
            submit_ns=submit_ns,
            duration_ns=duration_ns,
            gpus_milli=gpus_milli,
            tenant=row.name("user"),
        )
