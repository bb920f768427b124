"""`expertwire.comm.topology.topology`; see docs/architecture.md."""
