"""Pictures as they are shown: every pixel format and orientation has known values in 8-bit RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from relay_jax.data.decoding import (
    EXTENSIONS,
    FORMATS,
    Decoding,
    decode_picture,
    is_image,
    read_header,
)
from relay_jax.data.images import center_crop_resize
from relay_jax.data.source import open_source
from tests.conftest import error_of
from tests.data.pictures import colour, dataset_keys, write_zip

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, **decoding: Any) -> np.ndarray:
    return np.asarray(decode_picture(data, "a", Decoding(**decoding)))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr"])
def test_plain_pictures_are_what_pillow_makes_of_them(mode: str) -> None:
    form = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = encoded(Image.fromarray(NOISE).convert(mode), form)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(decoded(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_to_8_and_rounded(form: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    levels = decoded(encoded(Image.fromarray(values), form))
    np.testing.assert_array_equal(levels, np.rint(values / 257)[:, :, None].repeat(3, 2))


def test_16_bits_in_which_0_is_white_are_turned_round() -> None:
    values = np.array([[0, 257], [65535, 257 * 100]], np.uint16)
    data = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert decoded(data)[..., 0].tolist() == [[255, 254], [0, 155]]


@pytest.mark.parametrize(("kind", "what"), [(np.int32, "whole"), (np.float32, "floating point")])
def test_32_bits_are_refused_by_name(kind: type, what: str) -> None:
    data = encoded(Image.fromarray(np.zeros((4, 4), kind)), "TIFF")
    message = error_of(lambda: decode_picture(data, "scan.tif"))
    assert message.startswith("scan.tif: ") and f"32-bit {what} numbers; save it with 8" in message


def transparent(kind: str) -> bytes:
    """A red square on nothing, in which hidden colours are; palettes and greys have grey ones."""
    alpha = np.zeros((8, 8, 1), np.uint8)
    alpha[2:6, 2:6] = 255
    hidden = np.concatenate([NOISE[:8, :8] | 1, alpha], axis=2)
    hidden[2:6, 2:6, :3] = (200, 0, 0)
    image = Image.fromarray(hidden)
    if kind in ("PNG", "WEBP", "TIFF"):
        return encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    if kind == "LA":
        return encoded(image.convert("LA"), "PNG")
    square = alpha[:, :, 0] // 255
    if kind == "RGB":
        return encoded(
            Image.fromarray(colour(9) * (1 - square)[:, :, None]), "PNG", transparency=(9, 9, 9)
        )
    if kind == "I;16":
        return encoded(
            Image.fromarray((1 - square).astype(np.uint16) * 9000), "PNG", transparency=9000
        )
    palette = Image.fromarray(1 - square, "L")
    if kind == "L":
        return encoded(palette, "PNG", transparency=1)
    palette.putpalette([200, 0, 0, 10, 250, 10] + [0] * 750)
    return encoded(palette, kind.removesuffix(" P"), transparency=1)


@pytest.mark.parametrize(
    "kind", ["PNG", "WEBP", "TIFF", "LA", "L", "RGB", "I;16", "PNG P", "GIF P"]
)
def test_transparent_pictures_are_laid_on_the_background(kind: str) -> None:
    data = transparent(kind)
    assert read_header(data, "a").alpha
    for background in ((255, 255, 255), (10, 20, 30)):
        pixels = decoded(data, background=background)
        outside = np.ones((8, 8), bool)
        outside[2:6, 2:6] = False
        assert (pixels[outside] == background).all()
        assert len(np.unique(pixels[~outside], axis=0)) == 1
        assert pixels[4, 4, 0] != background[0]


def test_half_transparent_is_half_of_both_and_opaque_is_exact() -> None:
    half = Image.fromarray(np.dstack([colour(100), np.full((8, 8), 128, np.uint8)]))
    assert decoded(encoded(half, "PNG"), background=(200, 0, 200))[0, 0].tolist() == [150, 50, 150]
    opaque = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(Image.fromarray(opaque), "PNG")), NOISE)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_the_camera_says(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(NOISE)
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(image, form, exif=exif, **options)
    with Image.open(io.BytesIO(encoded(image, form, **options))) as plain:
        stored = plain.convert("RGB")
    stored.getexif()[0x0112] = orientation
    shown = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(decoded(data), shown)
    header = read_header(data, "a")
    assert (header.height, header.width) == shown.shape[:2]
    assert header.turned == (orientation > 1)
    # Pillow turns TIFFs itself.
    if form != "TIFF":
        np.testing.assert_array_equal(decoded(data, exif=False), np.asarray(stored))
        assert not read_header(data, "a", Decoding(exif=False)).turned


def test_damaged_exif_leaves_a_photograph_as_it_lies() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decoded(data).shape == NOISE.shape


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_the_keys_of_a_configuration_reach_every_source(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.fromarray(colour(5)[:, :6]), "PNG", exif=exif)
    images = {"c/a.png": turned, "c/b.png": transparent("PNG"), "d/a.png": turned}
    path = write_zip(tmp_path / "set.zip", images)
    if kind == "folder":
        path = tmp_path / "set"
        for name, data in images.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    for keys, side, level in (({}, 6, 255), ({"exif": False, "background": (1, 2, 3)}, 8, 1)):
        source = open_source(dataset_keys(kind, path=str(path), **keys), [4], 0)
        assert source[0][0].shape[1] == 14 - side and source[1][0][0, 0, 0] == level
    for wrong in ((1, 2), (1, 2, 256), (0.5, 0, 0), "white", 255):
        keys = dataset_keys(kind, path=str(path), background=wrong)
        assert "three whole numbers from 0 to 255" in error_of(
            lambda keys=keys: open_source(keys, [4], 0)
        )


def test_programs_are_not_started_whatever_a_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostScript, for which Pillow starts Ghostscript, has no place among the formats."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/it-ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    assert "not an image" in error_of(lambda: decode_picture(text, "a.jpg"))
    assert not (tmp_path / "it-ran").exists() and "EPS" not in FORMATS


def test_a_picture_of_too_many_pixels_is_refused_at_its_header() -> None:
    data = encoded(Image.new("1", (20_000, 8_000)), "PNG")
    message = error_of(lambda: decode_picture(data, "a.png"))
    assert message.startswith("a.png: ") and "20000 x 8000 pixels; at most 134,217,728" in message


@pytest.mark.parametrize("size", [(30_000, 1), (1, 100_000), (3_000_000, 2)])
def test_a_strip_costs_what_the_crop_keeps(size: tuple[int, int]) -> None:
    """It would be enlarged to gigabytes."""
    image = Image.new("RGB", size)
    middle = (size[0] // 2, size[1] // 2)
    image.paste(
        (250, 0, 0), (max(middle[0] - 3, 0), max(middle[1] - 3, 0), middle[0] + 3, middle[1] + 3)
    )
    pixels = center_crop_resize(image, 256)
    assert pixels.shape == (256, 256, 3) and (pixels == (250, 0, 0)).all()


def test_all_endings_of_the_formats_are_read_and_hidden_files_are_none() -> None:
    Image.init()
    endings = {end for end, form in Image.EXTENSION.items() if form in FORMATS}
    assert set(EXTENSIONS) <= endings and {".tiff", ".jfif", ".gif", ".avif"} < set(EXTENSIONS)
    names = {
        "a.JPG": True,
        "b/c.webp": True,
        "b/._c.png": False,
        ".git/c.png": False,
        "__MACOSX/c.png": False,
        "d.txt": False,
        "e\\.f.png": False,
    }
    assert {name: is_image(name) for name in names} == names
