"""`expertwire.bench.kernels.run`; see docs/architecture.md."""
