"""`expertwire.deploy.grpc`; see docs/architecture.md."""
