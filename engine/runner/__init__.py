"""`expertwire.engine.runner.model_runner`; see docs/architecture.md."""
