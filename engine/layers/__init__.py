"""`expertwire.engine.layers`: the kinds of layers that decoders are made of."""

if not __name__.startswith("expertwire."):
    raise ImportError("import this package as `expertwire.engine.layers`")
