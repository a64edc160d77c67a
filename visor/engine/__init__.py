"""The engine: runs a schedule over the layers of a Hugging Face decoder.

`install(model)` once, then `with running(model, schedules): ...`. It knows the contracts `reduction.method` and
`families.base`, and no method or family; `vision/` and everything above it may import it.
"""

from typing import Any

__all__ = ["ElasticDecoder", "install", "running"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from visor.engine import decoder  # torch and transformers, only when something is asked for

    return getattr(decoder, name)
