"""Cost models: one file each; `roofline` from a data sheet, `table` from a measured profile."""
