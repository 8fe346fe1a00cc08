"""Record: a job as its source tells it, before anything is invented."""

from __future__ import annotations

from muxtune.spec.noun import noun


@noun
class Record:
    """A job as its source tells it, on the source's own clock; None where the source is silent."""

    job_id: str
    submit_ns: int
    duration_ns: int | None = None
    gpus_milli: int | None = None
    tenant: str | None = None
