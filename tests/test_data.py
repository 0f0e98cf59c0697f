"""Files, images, rejected images and token ids: what data.py promises."""
import errno
import io
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageOps

import data
from data import UserError, read_image, rejected_image
from training import batches


def picture(size=(40, 30), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(size=(8, 8), seed=0):
    out = io.BytesIO()
    picture(size, seed).save(out, "PNG")
    return out.getvalue()


# ---- files ----

def test_atomic_write_replaces_the_whole_file(tmp_path):
    data.atomic_write(tmp_path / "f", "old")
    data.atomic_write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fills_keeps_the_old_file_and_leaves_no_rubbish(tmp_path, monkeypatch, call):
    data.atomic_write(tmp_path / "f", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        data.atomic_write(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_a_limit_on_file_size_takes_half_a_line_back_and_keeps_the_old_file(tmp_path):
    """The kernel's own refusal, in the midst of a write: RLIMIT_FSIZE in a process of its own."""
    script = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import data
data.append_jsonl("log.jsonl", {{"a": 1}}); data.atomic_write("f", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
long = "x" * 200
for write in (lambda: data.append_jsonl("log.jsonl", {{"a": long}}), lambda: data.atomic_write("f", long)):
    try: write()
    except data.UserError as error: print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert out.stdout.count("File too large") == 2
    assert (tmp_path / "log.jsonl").read_text() == '{"a": 1}\n' and (tmp_path / "f").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["f", "log.jsonl"]


def test_a_whole_file_makes_its_folder_and_a_line_does_not(tmp_path):
    data.atomic_write(tmp_path / "a" / "b" / "f", "new")
    assert (tmp_path / "a" / "b" / "f").read_text() == "new"
    with pytest.raises(UserError, match="No such file or directory"):
        data.append_jsonl(tmp_path / "no" / "f", {})
    with pytest.raises(UserError, match="could not be written"):
        data.atomic_write(tmp_path / "a" / "b" / "f" / "g", "")


def test_json_lines_come_back_as_they_went(tmp_path):
    rows = [{"a": "ä\n\u2028"}, {"b": [1, None]}, {"c": "\ud800"}]
    for row in rows:
        data.append_jsonl(tmp_path / "f", row)
    data.write_jsonl(tmp_path / "g", rows)
    assert list(data.read_jsonl(tmp_path / "f")) == list(data.read_jsonl(tmp_path / "g")) == rows


def test_a_torn_last_line_is_passed_over_only_when_allowed_and_cut_off_by_the_next_append(tmp_path):
    path = tmp_path / "f"
    path.write_text('{"a": 1}\n{"a": 2')
    with pytest.raises(UserError, match="f, line 2: broken JSON"):
        list(data.read_jsonl(path))
    assert list(data.read_jsonl(path, torn_ok=True)) == [{"a": 1}]
    data.append_jsonl(path, {"a": 3})
    assert list(data.read_jsonl(path)) == [{"a": 1}, {"a": 3}]


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path):
    (tmp_path / "f").write_text('{"a": 1}')
    data.append_jsonl(tmp_path / "f", {"a": 2})
    assert list(data.read_jsonl(tmp_path / "f")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("bad", ['{"a": }', "[1]", "nul", b"\xff\xfe", '{"a": 1}{"b": 2}', "[" * 100_000])
def test_a_broken_line_in_the_middle_is_named_even_when_torn_is_allowed(tmp_path, bad):
    (tmp_path / "f").write_bytes(
        b'{"a": 1}\n\n' + (bad.encode() if isinstance(bad, str) else bad) + b"\n{}\n"
    )
    with pytest.raises(UserError, match="f, line 3: "):
        list(data.read_jsonl(tmp_path / "f", torn_ok=True))


# ---- images ----

@pytest.mark.parametrize("mode", ["RGB", "CMYK", "P", "RGBA", "L", "LA", "1", "I;16", "I"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((5, 7), 128, np.uint8))
    if mode.startswith("I"):
        kind = np.uint16 if mode == "I;16" else np.int32
        image, path = Image.fromarray(np.full((5, 7), 128 * 257, kind)), "x.tiff"
    else:
        image = grey.convert("RGB").quantize(4) if mode == "P" else grey.convert("RGB").convert(mode)
        path = "x.tiff" if mode == "CMYK" else "x.png"
    image.save(tmp_path / path)
    out = read_image(tmp_path / path)
    assert (out.mode, out.size) == ("RGB", (7, 5))
    assert mode == "1" or abs(np.asarray(out).astype(int) - 128).max() <= 2


def test_alpha_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0)) == (200, 100, 50)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    picture((40, 30)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (30, 40)


def test_one_pixel_and_bytes_are_read():
    assert read_image(png((1, 1))).size == (1, 1)


@pytest.mark.parametrize("spoil", ["truncated jpeg", "truncated png", "text", "empty", "folder", "bomb"])
def test_an_unreadable_image_is_a_sentence(tmp_path, monkeypatch, spoil):
    path = tmp_path / "x.img"
    if spoil == "folder":
        path.mkdir()
    elif spoil == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        path.write_bytes(png())
    else:
        picture((200, 200)).save(path, "PNG" if "png" in spoil else "JPEG")
        whole = path.read_bytes()
        path.write_bytes({"text": b"hello", "empty": b""}.get(spoil, whole[:len(whole) // 2]))
    with pytest.raises(UserError, match="image .*x.img is unreadable .*; replace the file"):
        read_image(path)


def test_a_missing_image_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="x.png is missing; put it there or give the right --image_root"):
        read_image(tmp_path / "x.png")


# ---- rejected images ----

def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("strategy", data.REJECTED)
def test_a_rejected_image_depends_on_seed_strategy_and_id_alone(strategy):
    image, shown = picture((61, 47)), picture((30, 30), 1)

    def other():
        return shown
    first = rejected_image(strategy, image, 0, "a", other)
    untouched = image.tobytes()
    for i in range(3):  # other calls between, other generators advanced
        rejected_image("moco", image, i, f"b{i}", other)
        np.random.rand()
    assert same(first, rejected_image(strategy, image, 0, "a", other)) and image.tobytes() == untouched
    if strategy not in ("random", "blank"):
        assert first.size == image.size and first.mode == "RGB" and not same(first, image)
        assert not same(first, rejected_image(strategy, image, 1, "a", other))
        assert not same(first, rejected_image(strategy, image, 0, "b", other))


@pytest.mark.parametrize("strategy", [s for s in data.REJECTED if s != "random"])
@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (33, 33)])
def test_any_size_of_image_gives_a_rejected_image_of_that_size(strategy, size):
    for i in range(5):
        assert rejected_image(strategy, picture(size), 0, str(i)).size == size


@pytest.mark.parametrize(
    "strategy, low, high", [("crop", 0.01, 0.2), ("crop20-50", 0.2, 0.5), ("crop50-80", 0.5, 0.8),
                             ("crop80-100", 0.8, 1.0)]
)
@pytest.mark.parametrize("size", [(336, 336), (640, 427), (400, 1000)])
def test_a_crop_keeps_its_share_of_the_area_within_the_image(monkeypatch, strategy, low, high, size):
    """A thousand draws a size: the share (to a rounding of pixels), aspect, place, and size after."""
    boxes, sizes, image = [], [], Image.new("RGB", size)
    cut = SimpleNamespace(resize=lambda size, *_, **__: sizes.append(size))         # without the work
    monkeypatch.setattr(image, "crop", lambda box: boxes.append(box) or cut)
    for i in range(1000):
        rejected_image(strategy, image, 0, str(i))
    assert sizes == [size] * 1000
    x0, y0, x1, y1 = np.array(boxes).T
    w, h = x1 - x0, y1 - y0
    share = w * h / (size[0] * size[1])
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= size[0]).all() and (y1 <= size[1]).all()
    assert share.min() > low - 0.005 and share.max() < high + 0.005
    assert (
        share.min() < low + 0.05 * (high - low) + 0.005 and share.max() > high - 0.05 * (high - low) - 0.005
    )
    fits = share * size[0] * size[1] * 4 / 3 < min(size) ** 2  # where torchvision's aspect fits, it is kept
    assert (np.abs(np.log(w / h))[fits] < np.log(4 / 3) + 0.06).all()
    if strategy == "crop":  # uniform in share and in log aspect
        assert abs(share.mean() - 0.105) < 0.006 and abs(np.log(w / h).mean()) < 0.02


def test_a_crop_is_the_cut_resized_back():
    image = Image.merge("RGB", [Image.linear_gradient("L")] * 3)  # black above, white below
    rows = np.asarray(rejected_image("crop", image, 0, "a")).astype(int)[:, :, 0]
    assert (np.diff(rows, axis=0) >= 0).all() and rows[-1, 0] - rows[
        0, 0
    ] < 140  # a part of it, still a gradient


def test_patch_keeps_what_crop_keeps_where_it_stands():
    image = picture((60, 40))
    x, y, w, h = data.crop_box(60, 40, data.draw(3, "crop", "a", None), data.AREAS["crop"])
    kept, blank = np.array(rejected_image("patch", image, 3, "a")), rejected_image("blank", image, 0, "")
    expected = np.array(blank)
    expected[y:y + h, x:x + w] = np.array(image)[y:y + h, x:x + w]
    assert (kept == expected).all()
    enlarged = image.crop((x, y, x + w, y + h)).resize(image.size, Image.Resampling.BILINEAR)
    assert (np.array(rejected_image("crop", image, 3, "a")) == np.array(enlarged)).all()


def test_blank_has_no_content_and_noise_keeps_half_of_it():
    image = picture((336, 336))
    assert len(set(rejected_image("blank", image, 0, "a").get_flattened_data())) == 1
    image = Image.merge("RGB", [Image.linear_gradient("L").resize((336, 336))] * 3)
    noisy = np.asarray(rejected_image("noise", image, 0, "a")).astype(float)
    clean = np.asarray(image).astype(float)
    middle = (clean > 110) & (clean < 140)  # away from the clipping at 0 and 255
    assert 30 < (noisy - clean)[middle].std() < 40  # sqrt(1 - 0.75) of CLIP's deviation, 69
    assert np.corrcoef(noisy.ravel(), clean.ravel())[0, 1] > 0.8


def test_moco_augments_in_many_ways():
    image = picture((64, 64))
    out = [np.asarray(rejected_image("moco", image, 0, str(i))).astype(int) for i in range(200)]
    grey = sum((abs(o - o.mean(2, keepdims=True)) < 1).all() for o in out)
    assert 20 <= grey <= 60 and len({o.tobytes() for o in out}) == 200  # greyscale with probability 0.2


def test_random_is_another_record_by_seed_and_id():
    other = picture((9, 9), 5)
    assert rejected_image("random", picture(), 0, "a", lambda: other) is other
    draws = [batches.other_index(0, f"p{i}", i % 5, 5) for i in range(500)]
    assert all(0 <= j < 5 and j != i % 5 for i, j in enumerate(draws)) and min(np.bincount(draws)) > 60
    assert draws == [batches.other_index(0, f"p{i}", i % 5, 5) for i in range(500)]
    assert {batches.other_index(seed, "a", 0, 5) for seed in range(30)} == {1, 2, 3, 4}
    assert batches.other_index(0, "a", 0, 1) == 0                       # its own picture, which is refused


def test_a_rejected_image_of_your_own_is_a_function_and_a_line(monkeypatch):
    def mirrored(record, image, other, rng):
        return ImageOps.mirror(image) if record["question"] == "mirror" else other()
    monkeypatch.setitem(data.REJECTED, "mirrored", mirrored)
    image, record = picture(), {"question": "mirror"}
    made = rejected_image("mirrored", image, 0, "a", lambda: picture(seed=1), record)
    assert same(made, ImageOps.mirror(image))
    made = rejected_image("mirrored", image, 0, "a", lambda: picture(seed=1), {"question": ""})
    assert same(made, picture(seed=1))


def test_draws_are_keyed_as_they_always_were():
    """Numbers of the first release: a run that is made again sees the same rejected images."""
    def box(strategy, area):
        return data.crop_box(61, 47, data.rng_of(strategy, "7/1", "pair-7"), data.AREAS[area])
    assert box("crop", "crop") == box("patch", "crop") == (19, 20, 21, 18)
    assert box("crop50-80", "crop50-80") == (9, 3, 48, 43)
    assert data.hash64("7/1", "moco", "pair-7", None) == 981583921347196739
    assert data.rng_of("moco", 0, "a").random() == data.draw(0, "moco", "a", None).random()


# ---- token ids ----

def tokenised(max_length):
    """A record whose prompt has 10 tokens, 8 with its rejected image, and responses of 5 and of 9."""
    record = {"id": "a", "question": "?", "history": [], "chosen": "1" * 5, "rejected": "1" * 9, "meta": {}}
    o = SimpleNamespace(max_length=max_length)
    return batches.tokenise(Counted(), record, o, ((10, 10),), ((8, 8),), {"image_rejected"})


class Counted:
    """A family whose prompts are as long as their image is wide, and responses as their text."""
    def prompt_ids(self, question, sizes, history):
        return [1] * sizes[0][0]

    def response_ids(self, text):
        return [len(text)] * len(text)


def test_truncation_shortens_responses_only():
    pair, cut = tokenised(19), tokenised(16)
    assert (pair.prompt, pair.prompt_rejected) == ([1] * 10, [1] * 8)
    assert (pair.chosen, pair.rejected) == ([5] * 5, [9] * 9)
    assert cut == pair._replace(rejected=[9] * 6)


def test_a_prompt_that_leaves_no_room_is_a_sentence():
    with pytest.raises(UserError, match="the prompt of a has 10 tokens.*max_length 10; raise it or drop"):
        tokenised(10)


def test_a_sliver_of_a_picture_is_refused_in_a_sentence(tmp_path):
    """20,000 x 10 pixels: the shorter side scaled to 336 would make the longer 672,000."""
    Image.new("RGB", (20_000, 10)).save(tmp_path / "sliver.png")
    for read in (data.read_image, data.image_size):
        with pytest.raises(UserError, match="sliver.png is unreadable .20000 x 10 pixels are too narrow"):
            read(tmp_path / "sliver.png")
    Image.new("RGB", (1000, 10)).save(tmp_path / "narrow.png")
    assert data.read_image(tmp_path / "narrow.png").size == (1000, 10)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_size_from_the_header_is_that_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert data.image_size(tmp_path / "a.jpg") == data.read_image(tmp_path / "a.jpg").size
    assert data.image_size((tmp_path / "a.jpg").read_bytes()) == data.image_size(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(data.UserError, match="is unreadable"):
        data.image_size(tmp_path / "a.jpg")
