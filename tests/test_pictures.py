"""Initial images as people have them: what their files say beside the pixels is heeded."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from minireuse.sample.pictures import fitting_size, read_picture


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quiet(name: str) -> np.ndarray:
    """The pixels of a picture that is read without a note."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return np.array(read_picture(Path(name)))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_of_grey_become_eight(name: str) -> None:
    values = np.array([[0, 1, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(name)
    assert quiet(name)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_numbers_of_unknown_range_are_refused() -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save("i.tif")
    with pytest.raises(ValueError, match=r"i\.tif has more than 16 bits per channel; save it with 8 or 16"):
        read_picture(Path("i.tif"))
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save("f.tif")
    with pytest.raises(ValueError, match=r"f\.tif holds fractions of unknown range; save it with 8 or 16 bits"):
        read_picture(Path("f.tif"))


def transparent_colours() -> None:
    Image.fromarray(np.array([[[9, 8, 7, 255], [9, 8, 7, 0], [0, 0, 0, 51]]], dtype=np.uint8)).save("a.png")


def transparent_grey() -> None:
    Image.fromarray(np.array([[[9, 255], [9, 0], [0, 51]]], dtype=np.uint8), "LA").save("a.png")


def transparent_palette() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    image.putpalette([9, 8, 7, 9, 8, 7, 0, 0, 0])
    image.save("a.png", transparency=bytes([255, 0, 51]))


def one_clear_colour() -> None:
    image = Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3], [204, 204, 204]]], dtype=np.uint8))
    image.save("a.png", transparency=(1, 2, 3))


def one_clear_grey_of_sixteen_bits() -> None:
    image = Image.fromarray(np.array([[9 * 257, 300, 204 * 257]], dtype=np.uint16))
    image.save("a.png", transparency=300)


@pytest.mark.parametrize(
    "write",
    [
        *(transparent_colours, transparent_grey, transparent_palette),
        *(one_clear_colour, one_clear_grey_of_sixteen_bits),
    ],
)
def test_what_is_transparent_is_laid_onto_white(write: object) -> None:
    write()  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"a\.png is transparent in places; it is laid onto white"):
        pixels = np.array(read_picture(Path("a.png")))
    assert pixels[0, 0, 0] == 9
    assert pixels[0, 1:].tolist() == [[255] * 3, [204] * 3]


def test_an_alpha_channel_without_transparency_is_no_news() -> None:
    values = noise(4, 5, 4)
    values[..., 3] = 255
    Image.fromarray(values).save("a.png")
    assert np.array_equal(quiet("a.png"), values[..., :3])


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_several_pictures_the_first_is_used_and_that_is_told(name: str) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    first.save(name, save_all=True, append_images=[second], **({"lossless": True} if name == "a.webp" else {}))
    with pytest.warns(UserWarning, match=rf"{name} holds 2 pictures; the first of them is used"):
        assert np.array(read_picture(Path(name))).reshape(-1, 3).tolist() == [[255, 0, 0]] * 16


def test_the_second_picture_in_a_phone_s_file_is_no_news() -> None:
    values = Image.new("RGB", (8, 8), "white")
    values.save("a.jpg", format="MPO", save_all=True, append_images=[values])
    assert quiet("a.jpg").min() > 250


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_a_picture_is_turned_as_its_camera_was_held(suffix: str, orientation: int, turns: int) -> None:
    values = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(values).save(f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(quiet(f"a.{suffix}"), np.rot90(values, turns))


def profile_with_red_and_blue_swapped() -> bytes:
    """sRGB's, but for the colours that the first and the third channel stand for."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * count, 12)}
    red, blue = entries[b"rXYZ"] + 4, entries[b"bXYZ"] + 4
    data[red : red + 8], data[blue : blue + 8] = data[blue : blue + 8], data[red : red + 8]
    return bytes(data)


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_are_those_of_the_profile(alpha: bool) -> None:
    values = noise(4, 5, 4 if alpha else 3)
    values[..., 3:] = 255
    Image.fromarray(values).save("a.png", icc_profile=profile_with_red_and_blue_swapped())
    expected = values[..., 2::-1].astype(int)
    assert np.abs(quiet("a.png") - expected).max() <= 2


def test_a_profile_that_cannot_be_used_is_told() -> None:
    values = noise(4, 5, 3)
    for name, profile in (("a.png", b"nonsense"), ("b.png", profile_with_red_and_blue_swapped()[:300])):
        Image.fromarray(values).save(name, icc_profile=profile)
        with pytest.warns(UserWarning, match=rf"the colour profile of {name} is left out"):
            assert np.array_equal(np.array(read_picture(Path(name))), values)


@pytest.mark.parametrize(("gamma", "expected"), [(1.0, 188), (1 / 2.2, 128)])
def test_a_linear_png_is_shown_as_viewers_show_it(gamma: float, expected: int) -> None:
    """Half the light is 188 of 255 in sRGB; a gamma that is about sRGB's own changes nothing."""
    info = PngInfo()
    info.add(b"gAMA", struct.pack(">I", round(100000 * gamma)))
    Image.new("RGB", (2, 2), (128, 128, 128)).save("a.png", pnginfo=info)
    assert quiet("a.png")[0, 0].tolist() == [expected] * 3


def test_inks_become_colours() -> None:
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save("a.jpg")
    assert np.abs(quiet("a.jpg")[0, 0] - np.array([255, 0, 0])).max() <= 3


@pytest.mark.parametrize(
    ("picture", "asked", "expected"),
    [
        ((512, 512), (None, None), (512, 512)),
        ((128, 512), (None, None), (256, 1024)),
        ((3000, 4000), (None, None), (448, 576)),  # 443 x 591
        ((10, 100_000), (None, None), (64, 4096)),
        ((100_000, 10), (None, None), (4096, 64)),
        ((300, 600), (None, 640), (320, 640)),
        ((300, 600), (128, None), (128, 256)),
        ((300, 600), (512, 512), (512, 512)),
    ],
)
def test_proportions_are_kept_where_no_size_is_asked(
    picture: tuple[int, int], asked: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    assert fitting_size(picture, asked, own=512, unit=64) == expected
