"""`expertwire.bench.scheduler`; see docs/architecture.md."""
