"""The mathematics of a branch on tensors: no modules, no models."""
