"""`expertwire.bench.test_time`; see docs/architecture.md."""
