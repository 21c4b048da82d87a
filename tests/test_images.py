"""inr_precond.data.images: files of every kind, coordinates, names, and one sentence for each bad input."""
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from inr_precond.data import images
from inr_precond.data.images import DIV2K, ImageData, data_root, default_image, free_pictures, image_names, load_image


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


def to_float(a): return torch.from_numpy(np.asarray(a) / np.float32(255))


def png16(array, color_type):
    "PNG bytes of a 16-bit (H, W[, C]) array; Pillow cannot write these."
    h, w = array.shape[:2]
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + array[i].astype(">u2").tobytes() for i in range(h))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, color_type, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- what is accepted -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("suffix,options", [("png", {}), ("webp", {"lossless": True}), ("tif", {}), ("tiff", {"compression": "tiff_lzw"}), ("bmp", {})])
def test_lossless_formats_give_the_exact_pixels(tmp_path, photo, suffix, options):
    Image.fromarray(photo).save(tmp_path / f"a.{suffix}", **options)
    image = load_image(tmp_path / f"a.{suffix}", size=None)
    assert torch.equal(image.pixels, to_float(photo)) and image.pixels.dtype == torch.float32
    assert (image.name, image.height, image.width) == ("a", 24, 24)


def test_jpeg_is_close(tmp_path):
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    assert (load_image(tmp_path / "a.jpg", size=None).pixels - to_float(smooth)).abs().max() < .02


def test_grey_is_copied_to_three_channels(tmp_path, photo):
    Image.fromarray(photo[..., 0]).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", size=None).pixels, to_float(photo[..., :1]).expand(24, 24, 3))


def test_black_and_white_and_palette(tmp_path, photo):
    bits = photo[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert torch.equal(load_image(tmp_path / "bits.png", size=None).pixels[..., 1], torch.from_numpy(bits).float())
    palette = Image.fromarray(photo).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert torch.equal(load_image(tmp_path / "palette.png", size=None).pixels, to_float(palette.convert("RGB")))


def test_rgba_lies_on_white_not_on_what_is_under_transparency(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0] = (255, 0, 0, 0)      # fully transparent red
    rgba[1] = (0, 0, 0, 128)      # half transparent black
    rgba[2] = (0, 0, 255, 255)    # opaque blue
    Image.fromarray(rgba).save(tmp_path / "a.png")
    p = load_image(tmp_path / "a.png", size=None).pixels
    assert (p[0] == 1).all() and p[2, 0].tolist() == [0, 0, 1]
    torch.testing.assert_close(p[1], torch.full((4, 3), 127 / 255), atol=1 / 255, rtol=0)


def test_grey_alpha_and_transparent_palette_lie_on_white(tmp_path):
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    clear = Image.new("P", (4, 4), 0); clear.putpalette([10, 20, 30]); clear.save(tmp_path / "p.png", transparency=0)
    for name in ("la.png", "p.png"): assert (load_image(tmp_path / name, size=None).pixels == 1).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    "Pillow's convert('RGB') turns every value above 255 into white."
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / f"a.{suffix}")
    torch.testing.assert_close(load_image(tmp_path / f"a.{suffix}", size=None).pixels[..., 2], torch.from_numpy(deep / 65535).float())
    flat = np.full((16, 16), 30000, np.uint16); Image.fromarray(flat).save(tmp_path / f"flat.{suffix}")
    torch.testing.assert_close(load_image(tmp_path / f"flat.{suffix}", size=8).pixels, torch.full((8, 8, 3), 30000 / 65535))


@pytest.mark.parametrize("color_type,channels", [(2, 3), (6, 4)])
def test_16_bit_colour_within_one_8_bit_step(tmp_path, color_type, channels):
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8, channels), np.uint16)
    deep[..., 3:] = 65535
    (tmp_path / "a.png").write_bytes(png16(deep, color_type))
    p = load_image(tmp_path / "a.png", size=None).pixels
    assert (p - torch.from_numpy(deep[..., :3] / 65535).float()).abs().max() < 1 / 255


def test_float_tiff(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.tif")
    torch.testing.assert_close(load_image(tmp_path / "a.tif", size=None).pixels[..., 0], torch.from_numpy(values))


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    r, g, b = load_image(tmp_path / "a.jpg", size=None).pixels.mean((0, 1))
    assert r > .95 and g < .05 and b < .05


@pytest.mark.parametrize("orientation,turn", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a)), (2, lambda a: a[:, ::-1])])
def test_exif_orientation_is_applied(tmp_path, photo, orientation, turn):
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(photo[:, :12]).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "a.png", size=None).pixels, to_float(np.ascontiguousarray(turn(photo[:, :12]))))


# --- resizing ---------------------------------------------------------------------------------------------------

def test_resize_averages_before_it_shrinks():
    "Stripes of one pixel become grey; without antialiasing they would stay stripes."
    stripes = np.zeros((64, 64), np.uint8); stripes[:, ::2] = 255
    small = np.asarray(images._resize(Image.fromarray(stripes), 8))
    assert abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 3


def test_astronaut_is_resized_with_pillows_triangle_filter():
    "1/8, 3/8, 3/8, 1/8 along each axis at a factor of two, up to the rounding of Pillow's two passes."
    from skimage.data import astronaut
    a, w = astronaut().astype(float), np.array([1, 3, 3, 1]) / 8
    for axis in (0, 1):
        a = np.moveaxis(a, axis, 0)
        a = np.moveaxis(sum(w[m] * a[1 + m:1 + m + 508:2] for m in range(4)), 0, axis)
    got = load_image("astronaut").pixels.numpy()[1:-1, 1:-1] * 255
    assert np.abs(got - a).max() <= 1.01 and np.abs(got - a).mean() < .35


def test_an_image_that_is_not_square_is_cut_to_its_centre(tmp_path, photo):
    wide = np.concatenate([np.zeros((24, 30, 3), np.uint8), photo, np.zeros((24, 30, 3), np.uint8)], 1)
    Image.fromarray(wide).save(tmp_path / "wide.png"); Image.fromarray(wide.swapaxes(0, 1).copy()).save(tmp_path / "tall.png")
    assert torch.equal(load_image(tmp_path / "wide.png", size=24).pixels, to_float(photo))
    assert torch.equal(load_image(tmp_path / "tall.png", size=24).pixels, to_float(photo).transpose(0, 1))
    whole = load_image(tmp_path / "wide.png", size=None)
    assert (whole.height, whole.width) == (24, 84)


def test_float_resizing_stays_in_range(tmp_path):
    Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 65535).astype(np.uint16)).save(tmp_path / "a.png")
    for size in (2, 7, 63, 200): assert load_image(tmp_path / "a.png", size=size).pixels.shape == (size, size, 3)


# --- coordinates and hash ----------------------------------------------------------------------------------------

def test_coordinates_agree_with_pixels_sample_by_sample():
    "Catches swapped coordinates, a transposed image, excluded ends, and half-pixel centres."
    h, w = 4, 7
    rows, columns = np.meshgrid(np.linspace(0, 1, h), np.linspace(0, 1, w), indexing="ij")
    image = ImageData(torch.from_numpy(np.stack([rows, columns, 0 * rows], -1)).float(), "ramp")
    x = image.coordinates()
    assert x.shape == (28, 2) and x.dtype == torch.float32
    torch.testing.assert_close(x, 2 * image.pixels.reshape(-1, 3)[:, :2] - 1)
    x = image.coordinates("cpu", torch.float64)
    assert x.dtype == torch.float64 and x.min() == -1 and x.max() == 1
    torch.testing.assert_close(x, -x.flip(0))


def test_hash_sees_pixels_and_shape_but_not_the_name():
    a = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(0))
    first = ImageData(a, "a").sha256
    assert len(first) == 64 and ImageData(a.clone(), "b", "elsewhere").sha256 == first
    assert ImageData(a.reshape(6, 4, 3), "a").sha256 != first
    b = a.clone(); b[3, 5, 2] = torch.nextafter(b[3, 5, 2], torch.tensor(2.))
    assert ImageData(b, "a").sha256 != first
    assert ImageData(a.transpose(0, 1), "a").sha256 == ImageData(a.transpose(0, 1).contiguous(), "a").sha256


def test_hash_of_the_default_image_is_the_same_everywhere():
    "A changed resizing filter, rounding or channel order would make old runs of the astronaut unfindable."
    assert load_image("astronaut").sha256 == "d516e48d3f78c44fdd5a860c48a5365f9e6a51e62bcbac09418eeb949f510f96"
    assert load_image("astronaut", size=None).sha256 == "a602eb8f5f1ae6845ad33e8f974fa8812d37261a1bedbe639ddbb3fc9bbf3689"


# --- names and data ---------------------------------------------------------------------------------------------

def test_astronaut_needs_no_network(no_data):
    code = ("import socket\ndef refuse(*a, **k): raise OSError('no network')\nsocket.socket.connect = refuse\nsocket.getaddrinfo = refuse\n"
            "from inr_precond.data.images import load_image\nassert load_image('astronaut').height == 256")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=no_data)


def test_default_without_data_is_the_astronaut(no_data):
    assert default_image() == "astronaut" and data_root() is None and set(DIV2K) < set(image_names())


def test_missing_data_names_folder_script_and_alternative(no_data):
    with pytest.raises(FileNotFoundError) as e: load_image("lion")
    for part in (os.path.join("data", "div2k", "test_14.png"), "data_scripts/div2k.py", "INR_PRECOND_DATA", "astronaut"): assert part in one_sentence(e)


@pytest.mark.filterwarnings("error")
def test_a_mistyped_data_root_is_warned_about(no_data, monkeypatch):
    monkeypatch.setenv("INR_PRECOND_DATA", "nowhere")
    with pytest.warns(UserWarning, match="not a folder"): assert default_image() == "astronaut"


@pytest.mark.parametrize("place", ["div2k/data_div2k.npz", "data_div2k.npz"])
def test_the_packed_file_gives_the_same_pixels_as_the_crops(no_data, monkeypatch, place):
    crops = np.random.default_rng(1).integers(0, 256, (15, 32, 32, 3), np.uint8)
    (no_data / "d" / "div2k").mkdir(parents=True); monkeypatch.setenv("INR_PRECOND_DATA", str(no_data / "d"))
    np.savez(no_data / "d" / place, test_data=crops, train_data=crops[::-1])
    assert default_image() == "lion"
    packed = load_image("lion", size=None)
    assert torch.equal(packed.pixels, to_float(crops[14])) and torch.equal(load_image("div2k-05", size=None).pixels, to_float(crops[5]))
    Image.fromarray(crops[14]).save(no_data / "d" / "div2k" / "test_14.png")
    assert load_image("lion", size=16).sha256 != packed.sha256 == load_image("lion", size=None).sha256


@pytest.mark.parametrize("content", [b"", b"<html>", dict(other=np.zeros(3)), dict(test_data=np.zeros((3, 8, 8, 3), np.uint8)), dict(test_data=np.zeros((15, 8))),
                                     dict(test_data=np.full((15, 8, 8, 3), -1.)), dict(test_data=np.full((15, 8, 8, 3), np.nan)), dict(test_data=np.array([None]))])
def test_a_damaged_packed_file_is_one_sentence(no_data, content):
    (no_data / "data").mkdir()
    path = no_data / "data" / "data_div2k.npz"
    if isinstance(content, dict): np.savez(path, **content)
    else: path.write_bytes(content)
    with pytest.raises(ValueError) as e: load_image("lion")
    assert "data_scripts/div2k.py" in one_sentence(e)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:INR_PRECOND_DATA")
def test_the_papers_lion():
    if data_root() is None or not (data_root() / "div2k" / "test_14.png").is_file(): pytest.skip("needs div2k/test_14.png under INR_PRECOND_DATA")
    lion = load_image("lion")
    assert default_image() == "lion" and lion.pixels.shape == (256, 256, 3) and "DIV2K" in lion.source
    assert lion.sha256 == "200dd2afc26e894debc679ca126cc8b6bd15d043622e7280e64bbc3dcf2874de"
    assert len({load_image(name, size=None).sha256 for name in DIV2K}) == len(DIV2K)


# --- what is refused, in one sentence ----------------------------------------------------------------------------

def bad_files(folder, photo):
    Image.fromarray(photo).save(folder / "good.png"); data = (folder / "good.png").read_bytes()
    Image.fromarray(np.tile(photo, (4, 4, 1))).save(folder / "good.jpg"); jpeg = (folder / "good.jpg").read_bytes()
    (folder / "empty.png").touch()
    (folder / "truncated.png").write_bytes(data[:len(data) // 2]); (folder / "truncated.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (folder / "header.png").write_bytes(data[:20])
    (folder / "corrupt.png").write_bytes(data[:60] + bytes(60) + data[120:])
    (folder / "text.png").write_text("not a picture"); (folder / "noise.jpg").write_bytes(os.urandom(999))
    Image.new("L", (1, 1)).save(folder / "pixel.png"); Image.new("L", (1, 40)).save(folder / "column.png"); Image.new("L", (40, 1)).save(folder / "row.png")
    Image.fromarray(np.array([[0, np.nan], [1, .5]], np.float32)).save(folder / "nan.tif")
    Image.fromarray(np.array([[0, 255.], [1, .5]], np.float32)).save(folder / "range.tif")
    (folder / "folder.png").mkdir()


@pytest.mark.parametrize("name,kind,words", [
    ("missing.png", FileNotFoundError, ["no image file", "PNG", "astronaut"]), ("empty.png", ValueError, ["empty"]),
    ("truncated.png", ValueError, ["damaged or incomplete"]), ("truncated.jpg", ValueError, ["damaged or incomplete"]), ("header.png", ValueError, ["fetch it again"]),
    ("corrupt.png", ValueError, ["damaged or incomplete"]), ("text.png", ValueError, ["not an image"]), ("noise.jpg", ValueError, ["not an image"]),
    ("pixel.png", ValueError, ["1 x 1", "cannot span [-1, 1]"]), ("column.png", ValueError, ["40 x 1"]), ("row.png", ValueError, ["1 x 40"]),
    ("nan.tif", ValueError, ["NaN"]), ("range.tif", ValueError, ["255"]), ("folder.png", IsADirectoryError, ["is a folder"])])
@pytest.mark.parametrize("size", [None, 8])
def test_bad_files(tmp_path, photo, name, kind, words, size):
    bad_files(tmp_path, photo)
    with pytest.raises(kind) as e: load_image(tmp_path / name, size)
    for word in [name, *words]: assert word in one_sentence(e)


def test_huge_images_are_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (300, 200)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 59_999)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError) as e: load_image(tmp_path / "a.png", size=None)
    assert "60,000 pixels" in one_sentence(e) and "crop or shrink" in one_sentence(e)


@pytest.mark.parametrize("side", [10_000, 60_000, 2**31 - 1])
def test_a_decompression_bomb_is_one_sentence(tmp_path, side):
    "A header of some bytes that promises gigabytes: above our limit, above Pillow's warning, above Pillow's error."
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError) as e: load_image(tmp_path / "bomb.png")
    assert "crop or shrink" in one_sentence(e)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged headers
def test_random_damage_never_escapes_as_anything_but_one_sentence(tmp_path, photo):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp"):
        good = tmp_path / f"good.{suffix}"; Image.fromarray(photo).save(good); data = good.read_bytes()
        for k in range(60):
            bad = bytearray(data) if k % 2 else bytearray(data[:rng.integers(1, len(data))])
            for _ in range(3): bad[rng.integers(min(len(bad), 150))] = rng.integers(256)
            path = tmp_path / f"bad.{suffix}"; path.write_bytes(bad)
            try: load_image(path, size=None)
            except ValueError as e: assert "\n" not in str(e) and "bad." in str(e)


@pytest.mark.parametrize("name,hint", [("loin", "lion"), ("Astronaut", "astronaut"), ("div2k-2", "div2k-02")])
def test_an_unknown_name_lists_the_known_and_the_closest(no_data, name, hint):
    with pytest.raises(ValueError) as e: load_image(name)
    assert f"did you mean {hint!r}" in one_sentence(e) and all(n in str(e.value) for n in image_names())


@pytest.mark.parametrize("name", ["", "zzzzzz"])
def test_an_unknown_name_without_a_close_one(no_data, name):
    with pytest.raises(ValueError) as e: load_image(name)
    assert "did you mean" not in one_sentence(e) and "astronaut" in str(e.value)


@pytest.mark.parametrize("thing", [None, 3, np.zeros((4, 4, 3)), ["lion"]])
def test_a_name_of_the_wrong_type(thing):
    with pytest.raises(TypeError) as e: load_image(thing)
    assert "path of an image file" in str(e.value)


@pytest.mark.parametrize("size", [0, 1, -256, 2.5, 256., True, "256", 10**6])
def test_bad_sizes(size):
    with pytest.raises(ValueError) as e: load_image("astronaut", size)
    assert "size" in one_sentence(e)


@pytest.mark.parametrize("pixels", [torch.zeros(4, 4), torch.zeros(4, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 4, 3), torch.zeros(4, 1, 3), torch.zeros(0, 0, 3), torch.zeros(4, 4, 3).double(),
                                    np.zeros((4, 4, 3), np.float32), torch.full((4, 4, 3), torch.nan), torch.full((4, 4, 3), torch.inf), torch.full((4, 4, 3), 1.01), torch.full((4, 4, 3), -.01)])
def test_image_data_refuses_what_is_no_image(pixels):
    with pytest.raises(ValueError) as e: ImageData(pixels, "mine")
    assert "'mine'" in one_sentence(e)


# --- several pictures ---------------------------------------------------------------------------------------------

def quarters_only(monkeypatch): monkeypatch.setattr(images, "_PHOTOGRAPHS", ("no such picture.png",))


def test_free_pictures_are_distinct_photographs_that_can_be_read(no_data):
    "A list of names that are not in the package would fail in the middle of an experiment; nothing is written where no folder is given."
    found = free_pictures()
    assert 1 <= len(found) <= 5 and len({load_image(name, 16).sha256 for name in found}) == len(found)
    assert not list(no_data.iterdir())


@pytest.mark.parametrize("count", [1, 3, 4])
def test_quarters_complete_the_photographs(no_data, monkeypatch, count):
    "One photograph, then quarters row by row; their pixels are those of the astronaut. A loop that went on to four would return too many."
    monkeypatch.setattr(images, "_PHOTOGRAPHS", ("no such picture.png", "coffee.png"))
    found = free_pictures(count, no_data / "a" / "b")
    assert len(found) == count and found[0].endswith("coffee.png")
    assert [os.path.relpath(name, no_data) for name in found[1:]] == [os.path.join("a", "b", f"astronaut_quarter_{k}.png") for k in ("00", "01", "10")[:count - 1]]
    whole = load_image("astronaut", None).pixels
    for name, (row, column) in zip(found[1:], ((0, 0), (0, 256), (256, 0))): assert torch.equal(load_image(name, None).pixels, whole[row:row + 256, column:column + 256])
    if count > 1: assert sorted(os.listdir(no_data / "a" / "b")) == [os.path.basename(name) for name in found[1:]], "a temporary file was left"


def test_there_are_four_quarters_and_none_without_a_folder(no_data, monkeypatch):
    "Quarters of the astronaut where none were asked for would let a race be judged on the picture it was tuned on."
    quarters_only(monkeypatch)
    assert len(set(free_pictures(9, no_data))) == 4 and free_pictures(9) == []


def test_quarters_are_written_anew_over_damaged_ones(no_data, monkeypatch):
    quarters_only(monkeypatch)
    (no_data / "astronaut_quarter_00.png").write_text("cut off")
    assert load_image(free_pictures(1, no_data)[0], None).height == 256


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_a_bad_count_of_pictures(count):
    with pytest.raises(ValueError) as error: free_pictures(count)
    assert repr(count) in one_sentence(error) and "at least 1" in str(error.value)


def test_a_file_in_place_of_the_pictures_folder(no_data, monkeypatch):
    quarters_only(monkeypatch)
    (no_data / "pictures").write_text("")
    with pytest.raises(NotADirectoryError) as error: free_pictures(2, no_data / "pictures")
    assert "give a folder" in one_sentence(error)


def test_import_is_light():
    "Pillow, scikit-image and numpy's image stack are imported when an image is loaded, not before."
    code = "import sys, inr_precond.data.images; assert not {'PIL', 'skimage', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
