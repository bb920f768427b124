"""`expertwire.bench.first_contact.run`; see docs/architecture.md."""
