"""Alibaba PAI's task table, cluster-trace-gpu-v2020 (Weng et al., NSDI'22); the published file has no header line."""

from __future__ import annotations

from pathlib import Path

from muxtune.sim.traces.formats.base import CsvFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row, head_line

HEADER = (
    *("job_name", "task_name", "inst_num", "status", "start_time", "end_time"),
    *("plan_cpu", "plan_mem", "plan_gpu", "gpu_type"),
)
STATES = ("Running", "Terminated", "Failed", "Waiting")


class AlibabaPai(CsvFormat):
    """One line a task of a job (worker, ps, …); tasks that ask for no GPU or have not ended are no jobs."""

    COLUMNS = ("job_name", "task_name", "inst_num", "start_time", "end_time", "plan_gpu")
    GIVES = frozenset({"duration_ns", "gpus_milli"})
    NOTE = (
        "start_time (the launch: the table has no submission) is the arrival, duration is end - start, GPUs are "
        "inst_num × plan_gpu / 100; the table has no users, a column `user` is read where it was joined in"
    )
    EXAMPLE = (
        "j1,worker,2.0,Terminated,100.0,400.0,600.0,29.3,50.0,MISC\n"
        "j1,ps,1.0,Terminated,100.0,400.0,600.0,29.3,,\n"
        "j2,tensorflow,1.0,Failed,90.0,95.5,600.0,29.3,100.0,V100\n"
        "j3,worker,1.0,Running,120.0,,600.0,29.3,100.0,T4\n"
        "j4,worker,4.0,Terminated,100.0,100.0,600.0,29.3,200.0,P100\n"
    )
    SPOILT = (EXAMPLE + "j5,worker,some,Terminated,100.0,100.0,600.0,29.3,200.0,P100\n", "line 6", "inst_num")

    def header(self, path: Path) -> tuple[str, ...]:
        """The table's columns, where the first line is a task."""
        fields = head_line(path).split(",")
        return HEADER if len(fields) == len(HEADER) and fields[3] in STATES else ()

    def matches(self, path: Path) -> bool:
        """Whether the first line is the header or a task."""
        return bool(self.header(path)) or super().matches(path)

    def gives(self, path: Path) -> frozenset[str]:
        """Tenants where a user column was joined in."""
        users = {"tenant"} if "user" in head_line(path).split(",") else set()
        return self.GIVES | users

    def record(self, row: Row) -> Record | str:
        """The job of a line, or why it is none."""
        start_ns = row.seconds_ns("start_time")
        end_ns = row.seconds_ns("end_time")
        instances = row.number_of("inst_num", 1, "give a count of instances, at least 0")
        percent = row.number_of("plan_gpu", 1000, "give GPUs in percent, at least 0")
        gpus_milli = round((1 if instances is None else instances) * (percent or 0) / 100)
        if not gpus_milli:
            return "asks for no GPU"
        if start_ns is None:
            return "was never launched"
        if end_ns is not None and end_ns < start_ns:
            raise row.wrong("end_time", "give a time that is not before start_time")
        return Record(
            job_id=f"{row.name('job_name')}/{row.name('task_name')}",
            submit_ns=start_ns,
            duration_ns=None if end_ns is None else end_ns - start_ns,
            gpus_milli=gpus_milli,
            tenant=row.text("user"),
        )
