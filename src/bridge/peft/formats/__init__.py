"""Adapter files of other tools, read and written: the only place that knows their names."""
