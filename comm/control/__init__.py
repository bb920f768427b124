"""`expertwire.comm.control.channel`; see docs/architecture.md."""
