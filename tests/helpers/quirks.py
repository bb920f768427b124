"""Functions that remove a quirk: each returns a function from a model's config to another one."""

from dataclasses import replace

from expertwire.engine.models.model_config import IgnoredTensors, MoeConfig


def attention(where=lambda old: True, **fields):
    """Change fields of those attention layers for which `where` holds; a callable gets the old value."""

    def changed(old):
        if not where(old):
            return old
        return replace(old, **{name: value(old) if callable(value) else value for name, value in fields.items()})

    def change(config):
        layers = [replace(layer, mixer=changed(layer.mixer)) for layer in config.layers]
        return replace(config, layers=tuple(layers))

    return change


def rope(**fields):
    return attention(lambda old: old.rope is not None, rope=lambda old: replace(old.rope, **fields))


def scaling(**fields):
    return attention(rope=lambda old: replace(old.rope, scaling=replace(old.rope.scaling, **fields)))


def moe(**fields):
    def change(config):
        layers = [
            replace(layer, mlp=replace(layer.mlp, **fields)) if isinstance(layer.mlp, MoeConfig) else layer
            for layer in config.layers
        ]
        return replace(config, layers=tuple(layers))

    return change


def unread(pattern):
    """Ignore some of the checkpoint's tensors."""
    return lambda config: replace(
        config, ignored_tensors=(*config.ignored_tensors, IgnoredTensors(pattern=pattern, why="a test"))
    )
