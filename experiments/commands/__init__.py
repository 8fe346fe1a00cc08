"""Commands, one file each: `run(...)` returns the object that `--json` prints, `show(body)` the text for people."""
