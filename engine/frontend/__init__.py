"""`expertwire.engine.frontend`; see docs/architecture.md."""
