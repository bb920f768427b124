"""`expertwire.bench.all_to_all.run`; see docs/architecture.md."""
