"""`expertwire.engine.loader`; see docs/architecture.md."""
