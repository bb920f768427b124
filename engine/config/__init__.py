"""`expertwire.engine.config.engine`; see docs/architecture.md."""
