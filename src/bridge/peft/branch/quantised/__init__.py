"""Quantised weights: one class for each way of packing one, and a table of them."""
