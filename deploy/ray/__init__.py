"""`expertwire.deploy.ray`; see docs/architecture.md."""
