"""`expertwire.engine.kv_cache`; see docs/architecture.md."""
