"""`expertwire.moe.eplb`: expert parallelism load balancing; see docs/architecture.md."""
