"""The cost of a front, on an engine without a model."""
