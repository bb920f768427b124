"""`expertwire.engine`; see docs/architecture.md for what lives here and who may import it."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.engine`, not as `engine`")
