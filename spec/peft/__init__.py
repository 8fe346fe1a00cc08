"""PEFT methods: one noun file each, found by file name; a torch file of the same name in executor/peft/ runs it."""

from muxtune.spec.peft.base import COLUMN_PARALLEL, TARGETS, Direction, PeftSpec, peft_kinds

__all__ = ["COLUMN_PARALLEL", "TARGETS", "Direction", "PeftSpec", "peft_kinds"]
