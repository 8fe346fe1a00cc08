"""PEFT methods: one noun file each, found by file name; a torch file of the same name in executor/peft/ runs it."""

from muxtune.spec.peft.base import TARGETS, PeftSpec, peft_kinds

__all__ = ["TARGETS", "PeftSpec", "peft_kinds"]
