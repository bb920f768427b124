"""`expertwire.engine.runner.runner`; see docs/architecture.md."""
