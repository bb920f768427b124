"""`expertwire.bench.demo`; see docs/architecture.md."""
