"""Functions of a branch other than W x + s · B A x: one file each."""
