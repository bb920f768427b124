"""`expertwire.scheduler._compiled`; see docs/architecture.md."""
