"""Azure's LLM inference requests (Patel et al., ISCA'24): TIMESTAMP, ContextTokens, GeneratedTokens. Arrivals only."""

from __future__ import annotations

from muxtune.sim.traces.formats.base import CsvFormat
from muxtune.sim.traces.record import Record
from muxtune.sim.traces.rows import Row


class AzureLlm(CsvFormat):
    """One line a request, taken as the arrival of one job; the file has no duration, GPUs or tenants."""

    COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    NOTE = "inference requests, not jobs: arrivals are real, token counts are checked and not used"
    EXAMPLE = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
        "2023-11-16 18:15:51.2225670,879,55\n"
    )
    SPOILT = (EXAMPLE + "2023-11-16 18:15:52,-5,55\n", "line 5", "ContextTokens")

    def record(self, row: Row) -> Record | str:
        """The arrival of a line."""
        for column in ("ContextTokens", "GeneratedTokens"):
            row.number_of(column, 1, "give a count of tokens, at least 0")
        submit_ns = row.submitted(row.instant_ns("TIMESTAMP"), "TIMESTAMP")
        return Record(job_id=f"azure-{row.number - 1}", submit_ns=submit_ns)
