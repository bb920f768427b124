"""`expertwire.bench.serving`; see docs/architecture.md."""
