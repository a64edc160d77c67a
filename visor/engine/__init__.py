"""The engine: runs a schedule over the layers of a Hugging Face decoder.

`install(model)` once, then `with running(model, schedules): ...`. It knows the contracts `reduction.method` and
`families.base`, and no method or family; `vision/` and everything above it may import it.
"""

from visor._lazy import handed_on

__all__ = ["ElasticDecoder", "install", "running"]
__getattr__ = handed_on(__name__, {"ElasticDecoder": "decoder", "install": "decoder", "running": "decoder"})
