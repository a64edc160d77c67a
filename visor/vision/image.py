"""One opening of an image, for tasks, chat and training: RGB as a person sees it, or an error that says why not.

`Image.convert("RGB")` alone leaves a photo sideways, drops transparency (dark ink on a clear ground turns black on
black), and clips everything deeper than 8 bits to white. All of it happens without a word, so everything goes through
here: `open_image` for what is still a file, `as_rgb` for what Pillow has opened.

    orientation     of the EXIF data is applied, and only once: the result carries no EXIF data
    transparency    alpha, a transparent colour or palette entry: composited on white
    16 bits         the range of the format, 0 to 65535
    32-bit integers 0 to 255, or 0 to 65535 if any value is larger; other ranges are refused
    floats          0 to 1, or 0 to 255 if any value is larger; other ranges, NaN and infinity are refused
    other modes     (CMYK, YCbCr, palettes, 1 bit, ...) as Pillow converts them; colour profiles are not applied
    animations      the first frame of a file; of an opened one the frame at which it stands

Imports neither torch nor transformers.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""Most pixels of an image, where nothing else is asked for: the number above which Pillow warns."""

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the tag; 1 is upright."""


def open_image(file: str | os.PathLike | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The RGB image in a file, given by its path or its bytes.

    Raises:
        ValueError: see `as_rgb`.
    """
    try:
        with _own_limit(), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
            return as_rgb(opened, max_pixels)
    except _Unreadable:
        raise
    except Exception as error:  # Pillow raises many kinds (OSError, SyntaxError, struct.error, ...) for broken files
        raise _Unreadable(error) from error


def as_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A Pillow image as an RGB image without metadata: a copy, also of what is RGB already.

    Args:
        max_pixels: larger images are refused before they are decoded. Above twice its own limit
            (`PIL.Image.MAX_IMAGE_PIXELS`) Pillow refuses a file whatever is asked for here.

    Raises:
        ValueError: it is no Pillow image, is damaged or cut off, has no pixels or more than `max_pixels`, holds NaN or
            infinity, or numbers of a range that is not known to mean black and white.
    """
    if not hasattr(image, "load"):
        raise _Unreadable(
            f"it is a {type(image).__name__}, not a Pillow image; PIL.Image.fromarray makes one of an array of 8-bit "
            "numbers, and PIL.Image.open opens a file"
        )
    try:
        with _own_limit():
            width, height = image.size
            if min(width, height) < 1:
                raise ValueError(f"its size is {width} x {height}")
            if width * height > max_pixels:
                raise ValueError(
                    f"it has {width} x {height} pixels, and the limit is {max_pixels:,} (max_pixels); make it smaller, "
                    "or raise the limit"
                )
            image.load()
            orientation = _orientation(image)  # PNG may have it behind the pixels, so not before they are read
            rgb = _converted(image)
            if orientation in UPRIGHT:
                rgb = rgb.transpose(UPRIGHT[orientation])
    except Exception as error:
        raise _Unreadable(error) from error
    rgb.info = {}  # else a second opening would turn the image again, and make a colour of it transparent
    return rgb


class _Unreadable(ValueError):
    """Every refusal, so that one is not wrapped in another."""

    def __init__(self, reason: str | Exception) -> None:
        text = " ".join(str(reason).split())
        if not isinstance(reason, (str, ValueError)):
            text = f"{type(reason).__name__}: {text}"
        super().__init__(f"the image cannot be read: {text}")


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's warning of large images is not shown: `max_pixels` decides about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, where there is none or the data are damaged: the pixels are still good."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        return 1


def _converted(image: Image.Image) -> Image.Image:
    """RGB, not yet turned upright."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        grey = np.rint(values.astype(np.float64) * (255 / _white(image, values))).astype(np.uint8)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow knows no direct way from premultiplied grey
            image = image.convert("LA")
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image, values: np.ndarray) -> int:
    """The value that means white in an image of deep integers or floats.

    Raises:
        ValueError: the values do not say.
    """
    if image.mode.startswith("I;16"):
        return 65535
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # either is NaN if any value is
        raise ValueError("it holds NaN or infinity")
    bounds = (1, 255) if image.mode == "F" else (255, 65535)
    if image.mode == "I" and image.format == "PNG":  # 16 bits: older releases of Pillow open them as 32
        return 65535
    if low >= 0 and high <= bounds[1]:
        return bounds[0] if high <= bounds[0] else bounds[1]
    kind = "floats" if image.mode == "F" else "32-bit integers"
    raise ValueError(
        f"its {kind} run from {low:g} to {high:g}, and which of them are black and white is not known; scale them to "
        f"0..{bounds[0]} or 0..{bounds[1]}"
    )
