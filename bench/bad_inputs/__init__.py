"""`expertwire.bench.bad_inputs.run`; see docs/architecture.md."""
