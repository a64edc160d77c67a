"""One opening of an image: what a person sees, in RGB, or why not; the same for tasks, chat and training."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from visor.vision import image as images
from visor.vision.image import as_rgb, open_image

ROOT = Path(__file__).parents[2]
INK, WHITE = (10, 20, 30), (255, 255, 255)


def picture(width=7, height=5, seed=0) -> Image.Image:
    """Noise: no turn of it looks like another."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def same(found: Image.Image, expected: Image.Image) -> bool:
    return found.mode == "RGB" and found.size == expected.size and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_sideways_photo_stands_upright_and_stays_so(orientation, form):
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    file = encoded(picture(), form, exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    assert expected.size == ((7, 5) if orientation < 5 else (5, 7))
    found = open_image(file)
    assert same(found, expected) and same(as_rgb(found), expected), "what is upright is not turned again"


def test_a_jpeg_is_turned_and_damaged_exif_data_leave_the_pixels_as_they_are():
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    assert open_image(encoded(picture(), "JPEG", exif=exif)).size == (5, 7)
    assert open_image(encoded(picture(), "JPEG", exif=b"Exif\0\0nonsense")).size == (7, 5)
    exif[images.ORIENTATION] = 77
    assert open_image(encoded(picture(), "JPEG", exif=exif)).size == (7, 5)


def drawing(mode: str) -> Image.Image:
    """Dark ink in the left pixel, a clear ground in the right one, which holds black where it holds a colour."""
    drawn = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    drawn.putpixel((0, 0), (*INK, 255))
    if mode in ("RGBA", "RGBa", "LA"):
        return drawn.convert(mode)
    if mode == "La":
        return drawn.convert("LA").convert("La")
    image = Image.new("RGB", (2, 1), INK)
    if mode == "P":
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
        image.putpalette([*INK, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.info["transparency"] = 1
    elif mode == "P, alpha a colour":
        image = drawing("P")
        image.info["transparency"] = bytes([255, 0])
    else:
        image = image.convert(mode)
        ground = (0, 0, 0) if mode == "RGB" else 0
        image.putpixel((1, 0), ground)
        image.info["transparency"] = ground
    return image


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "P", "P, alpha a colour", "RGB", "L"])
def test_dark_ink_on_a_clear_ground_is_ink_on_white(mode):
    ink = INK if mode[0] in "RP" else (18, 18, 18)
    found = as_rgb(drawing(mode))
    assert [found.getpixel((0, 0)), found.getpixel((1, 0))] == [ink, WHITE]
    assert same(as_rgb(found), found), "a colour that was transparent is not so twice"
    if mode not in ("RGBa", "La"):
        assert same(open_image(encoded(drawing(mode), "PNG")), found)


def test_half_transparent_ink_is_half_of_it():
    assert as_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I", "F", "F, to 255"])
def test_a_deep_gradient_stays_a_gradient(mode):
    levels = np.arange(256, dtype=np.uint8)[None]
    deep = {"I": levels.astype(np.int32) * 257, "F": levels / np.float32(255), "F, to 255": levels.astype(np.float32)}
    if mode in deep:
        gradient = Image.fromarray(deep[mode])
    else:
        wide = (levels.astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        gradient = Image.frombytes(mode, (256, 1), wide.tobytes())
    assert gradient.mode == mode.partition(",")[0]
    assert np.array_equal(np.asarray(as_rgb(gradient))[..., 0], levels)


def test_a_16_bit_file_and_its_transparent_grey():
    deep = Image.fromarray(np.array([[0, 32896, 65535, 300]], np.uint16))
    assert np.asarray(open_image(encoded(deep, "PNG")))[0, :, 1].tolist() == [0, 128, 255, 1]
    assert np.asarray(open_image(encoded(deep, "TIFF")))[0, :, 1].tolist() == [0, 128, 255, 1]
    deep.info["transparency"] = 0
    assert np.asarray(as_rgb(deep))[0, :, 1].tolist() == [255, 128, 255, 1]


def test_small_integers_of_32_bits_are_8_bit_numbers():
    assert np.asarray(as_rgb(Image.fromarray(np.array([[0, 200, 255]], np.int32))))[0, :, 2].tolist() == [0, 200, 255]


def test_other_modes_are_converted():
    assert as_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert as_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == WHITE
    assert as_rgb(Image.new("L", (1, 1), 9)).getpixel((0, 0)) == (9, 9, 9)
    assert as_rgb(Image.new("PA", (1, 1))).getpixel((0, 0)) == WHITE
    assert as_rgb(Image.new("YCbCr", (1, 1), (0, 128, 128))).getpixel((0, 0)) == (0, 0, 0)


def test_rgb_is_copied_as_it_is():
    image = picture()
    found = as_rgb(image)
    assert same(found, image) and found is not image


def test_an_animation_shows_its_first_frame():
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "TIFF", "PNG"):
        file = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert open_image(file).getpixel((0, 0)) == (255, 0, 0), form


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 0)), "its size is 0 x 0"),
        (Image.new("RGB", (3, 0)), "its size is 3 x 0"),
        (Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "NaN or infinity"),
        (Image.fromarray(np.array([[0.0, np.inf]], np.float32)), "NaN or infinity"),
        (Image.fromarray(np.array([[-1.0, 1.0]], np.float32)), "floats run from -1 to 1.*scale them to 0..1 or 0..255"),
        (Image.fromarray(np.array([[0.0, 1000.0]], np.float32)), "floats run from 0 to 1000"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "32-bit integers run from 0 to 70000"),
        (Image.fromarray(np.array([[-5, 7]], np.int32)), "32-bit integers run from -5 to 7"),
        (np.zeros((3, 3, 3), np.uint8), "a ndarray, not a Pillow image; PIL.Image.fromarray"),
        (None, "a NoneType, not a Pillow image"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_reason(image, message):
    with pytest.raises(ValueError, match=f"the image cannot be read: .*{message}"):
        as_rgb(image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "GIF"])
def test_a_truncated_file_is_refused_each_time_that_it_is_asked_for(form):
    file = encoded(picture(64, 64), form)[:-600]
    with pytest.raises(ValueError, match=r"the image cannot be read: .*truncated"):
        open_image(file)
    with Image.open(io.BytesIO(file)) as opened:
        for _ in range(3):
            with pytest.raises(ValueError, match=r"the image cannot be read: .*truncated"):
                as_rgb(opened)


def test_no_file_and_no_image(tmp_path):
    with pytest.raises(ValueError, match="the image cannot be read: FileNotFoundError"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="the image cannot be read: UnidentifiedImageError"):
        open_image(b"not a picture")


def test_the_limit_of_pixels_is_asked_for_and_pillows_warning_is_not_heard(monkeypatch):
    file = encoded(picture(40, 30), "PNG")
    assert open_image(file, max_pixels=1200).size == (40, 30)
    with pytest.raises(ValueError, match=r"40 x 30 pixels, and the limit is 1,199 \(max_pixels\)"):
        open_image(file, max_pixels=1199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # here Pillow warns, and above twice of it refuses
    assert open_image(file).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        open_image(file)


def test_a_lazy_image_over_the_limit_is_not_decoded(monkeypatch):
    with Image.open(io.BytesIO(encoded(picture(40, 30), "PNG"))) as opened:
        monkeypatch.setattr(opened, "load", lambda: pytest.fail("it was decoded"))
        with pytest.raises(ValueError, match="40 x 30 pixels"):
            as_rgb(opened, max_pixels=10)


def test_chat_and_training_open_alike(tmp_path):
    from visor.inference.chat import check_messages
    from visor.training.data import BadRow, read_image

    drawn = drawing("RGBA")
    (tmp_path / "drawn.png").write_bytes(encoded(drawn, "PNG"))
    content = [{"type": "image", "image": drawn}, {"type": "text", "text": "what?"}]
    expected = as_rgb(drawn)
    found = [
        check_messages([{"role": "user", "content": content}], None)[1][0],
        read_image(drawn, None, "row"),
        read_image("drawn.png", tmp_path, "row"),
        read_image({"bytes": encoded(drawn, "PNG")}, None, "row"),
    ]
    assert all(same(image, expected) for image in found)
    with pytest.raises(ValueError, match="2 x 1 pixels"):
        check_messages([{"role": "user", "content": content}], None, max_pixels=1)
    with pytest.raises(BadRow, match="its size is 0 x 0"):
        read_image(Image.new("RGB", (0, 0)), None, "row")
    with pytest.raises(BadRow, match="no image"):
        read_image({"url": "x"}, None, "row")


def test_files_are_opened_in_one_place():
    """`Image.open` and `.convert("RGB")` elsewhere would skip all of the above."""
    known = {
        "visor/vision/image.py",
        "visor/worlds/easy_vqa.py",  # PNG files of a package, all RGB; a floor below
    }
    found = set()
    for folder in ("visor", "evaluations", "reports"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                    opens = node.func.attr == "open" and getattr(node.func.value, "id", None) in ("Image", "pillow")
                    if opens or (node.func.attr == "convert" and first == "RGB"):
                        found.add(str(path.relative_to(ROOT)))
    assert found == known
