"""`expertwire.comm.all_to_all.base`; see docs/architecture.md."""
