"""The factory of the emoji model that the package brings today; `tools/emoji` makes the next one."""
