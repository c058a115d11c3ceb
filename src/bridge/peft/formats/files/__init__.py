"""Files of unknown origin, read and written."""
