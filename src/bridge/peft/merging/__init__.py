"""Fold branches into base weights, in memory and on disk."""
