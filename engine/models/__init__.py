"""`expertwire.engine.models`: one file per architecture family."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.engine.models`")
