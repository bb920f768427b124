"""`expertwire.moe.eplb`; see docs/architecture.md."""
