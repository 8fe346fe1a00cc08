"""Alibaba's openb pods, cluster-trace-gpu-v2023 (Weng et al., ATC'23): creation, schedule and deletion in seconds."""

from __future__ import annotations

from muxtune.sim.traces.formats.base import CsvFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row


class AlibabaOpenb(CsvFormat):
    """One line a pod; pods that ask for no GPU or were never scheduled are no jobs. No tenants."""

    COLUMNS = ("name", "num_gpu", "gpu_milli", "creation_time", "deletion_time", "scheduled_time")
    GIVES = frozenset({"duration_ns", "gpus_milli"})
    NOTE = (
        "duration is deletion - schedule; a pod with one GPU counts with the share of it that it asked for (gpu_milli)"
    )
    EXAMPLE = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "pod-a,4000,8000,1,460,,LS,Running,100,400,120\n"
        "pod-b,4000,8000,8,1000,,BE,Succeeded,90,1000,95\n"
        "pod-c,4000,8000,0,0,,BE,Succeeded,100,110,100\n"
        "pod-d,4000,8000,1,1000,,LS,Pending,130,150,\n"
        "pod-e,4000,8000,2,1000,A|B,LS,Failed,140,141,140\n"
    )
    SPOILT = (EXAMPLE + "pod-f,4000,8000,2,1000,,LS,Failed,140,130,139\n", "line 7", "deletion_time")

    def record(self, row: Row) -> Record | str:
        """The job of a line, or why it is none."""
        submit_ns = row.submitted(row.seconds_ns("creation_time"), "creation_time")
        start_ns, end_ns = row.seconds_ns("scheduled_time"), row.seconds_ns("deletion_time")
        gpus_milli = row.gpus_milli("num_gpu") or 0
        if gpus_milli == 1000:
            share = row.number_of("gpu_milli", 1, "give thousandths of a GPU, at least 0")
            gpus_milli = gpus_milli if share is None else share
        if not gpus_milli:
            return "asks for no GPU"
        if start_ns is None:
            return "was never scheduled"
        if end_ns is not None and end_ns < start_ns:
            raise row.wrong("deletion_time", "give a time that is not before scheduled_time")
        duration_ns = None if end_ns is None else end_ns - start_ns
        return Record(job_id=row.name("name"), submit_ns=submit_ns, duration_ns=duration_ns, gpus_milli=gpus_milli)
