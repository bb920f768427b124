"""`expertwire.deploy.proto`: the gRPC interface and the code that `make proto` generates from it."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.deploy.proto`")
