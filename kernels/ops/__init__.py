"""`expertwire.kernels.ops`; see docs/architecture.md."""
