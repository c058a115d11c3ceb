"""A branch on one module: its options, matrices, classes, and what can take one."""
