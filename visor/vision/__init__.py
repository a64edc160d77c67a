"""Vision: from the pixels of a sample to the features that enter the decoder.

`encode.encode` runs the tower, `encode.reduce` makes of its features what a schedule leaves, projected. It knows the
contracts `reduction.method` and `families.base`, and no method or family; methods, families and everything above them
may import it.
"""

from visor._lazy import handed_on

__all__ = ["PreparedSample", "ReducedFeatures", "VisionFeatures"]
__getattr__ = handed_on(
    __name__, {"PreparedSample": "prepared", "ReducedFeatures": "features", "VisionFeatures": "features"}
)
