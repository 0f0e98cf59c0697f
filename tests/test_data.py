"""Records, checks, images, rejected images and files: what data.py promises."""
import errno
import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SHARED, need
from PIL import Image

import data
from data import Pair, Records, UserError, check, read_image, rejected_image


def picture(size=(40, 30), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def png(size=(8, 8), seed=0):
    out = io.BytesIO()
    picture(size, seed).save(out, "PNG")
    return out.getvalue()


def pair(i=0, **changes):
    return {
        "id": f"p{i}",
        "image": "a.png",
        "question": "What is it?",
        "chosen": "A dog.",
        "rejected": "A cat.",
    } | changes


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    picture().save(tmp_path / "a.png")
    return tmp_path


def faults(records, capsys, **options):
    """The lines that the check writes, and the sentence it ends with."""
    capsys.readouterr()
    with pytest.raises(UserError) as end:
        check(records, **{"cache_dir": os.path.join(records.root, "cache"), "progress": False} | options)
    return capsys.readouterr().err.splitlines(), str(end.value)


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


def test_a_folder_that_does_not_exist_is_a_sentence(tmp_path):
    for write in (
        lambda: data.atomic_write(tmp_path / "no" / "f", ""),
        lambda: data.append_jsonl(tmp_path / "no" / "f", {}),
    ):
        with pytest.raises(UserError, match="No such file or directory"):
            write()


def test_json_lines_come_back_as_they_went(tmp_path):
    rows = [{"a": "ä\n\u2028"}, {"b": [1, None]}, {"c": "\ud800"}]
    for row in rows[:2]:
        data.append_jsonl(tmp_path / "f", row)
    with open(tmp_path / "f", "a") as handle:
        data.append_jsonl(handle, rows[2])
    assert list(data.read_jsonl(tmp_path / "f")) == rows


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


# ---- formats, in the layout in which each is published ----

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]
NO_TURNS = [TURNS[0], {"from": "gpt", "value": "A cat."}]
USER = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def mark(n):
    return {aspect: {"Rating": str(n), "Rationale": ""} for aspect in ("Helpfulness", "Visual Faithfulness")}


PUBLISHED = {
    "native": {
        "id": "x",
        "image": "a.png",
        "question": "What is it?",
        "chosen": "A dog.",
        "rejected": "A cat.",
    },
    "mdpo": {
        "img_path": "a.png",
        "prompt": "A chat between a curious user and an assistant. USER: <image>\nWhat is it? ASSISTANT:",
        "chosen": "A dog.",
        "rejected": "A cat.",
    },
    "llava": {"id": "x", "image": "a.png", "conversations": TURNS, "rejected_conversations": NO_TURNS},
    "rlhf-v": {
        "ds_name": "RLHF-V",
        "image": "a.png",
        "text": json.dumps({"question": "What is it?", "chosen": "A dog.", "rejected": "A cat."}),
        "origin_dataset": "coco",
        "origin_split": "{}",
        "idx": 3,
        "image_path": "a.png",
    },
    "rlaif-v": {
        "ds_name": "RLAIF-V",
        "image": "a.png",
        "question": "What is it?",
        "chosen": "A dog.",
        "rejected": "A cat.",
        "origin_dataset": "coco",
        "origin_split": "{}",
        "idx": "3",
        "image_path": "a.png",
    },
    "vlfeedback": {
        "id": "llava-reasoning-1",
        "prompt": "What is it?",
        "img_path": "a.png",
        "models": ["a", "b", "c"],
        "completions": [
            {"annotations": mark(3), "model": "a", "response": "An animal."},
            {"annotations": mark(5), "model": "b", "response": "A dog."},
            {"annotations": mark(1), "model": "c", "response": "A cat."},
            {"annotations": mark("N/A"), "model": "d", "response": "?"},
        ],
    },
    "llava-rlhf": {
        "id": "x",
        "image": "a.png",
        "conversations": TURNS[:1],
        "preference": 2,
        "hallucination": True,
        "output_1": {"from": "llava", "value": "A cat."},
        "output_2": {"from": "llava", "value": "A dog."},
    },
    "ha-dpo": {
        "image_id": 7,
        "question": "What is it?",
        "chosen": "A dog.",
        "reject": "A cat.",
        "answer": "yes",
        "correct": False,
    },
    "trl": {
        "images": ["a.png"],
        "prompt": USER,
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
        "rejected": [{"role": "assistant", "content": "A cat."}],
    },
}


@pytest.mark.parametrize("layout", ["lines", "array", "pretty", "parquet"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_format_reads_alike(folder, name, layout):
    (folder / "VG_100K").mkdir()
    picture().save(folder / "VG_100K/7.jpg")
    raw, path = PUBLISHED[name], folder / "d.json"
    if layout == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        raw = {
            k: v for k, v in raw.items() if k != "chosen" or name != "trl"
        }  # mixed content has no arrow type
        raw |= {"chosen": [{"role": "assistant", "content": "A dog."}]} if name == "trl" else {}
        pq.write_table(pa.Table.from_pylist([raw]), path)
    else:
        path.write_text({"lines": json.dumps(raw) + "\n", "array": json.dumps([raw]),
                         "pretty": json.dumps([raw], indent=2)}[layout])
    records = Records(path)
    assert records.format == name and len(records) == 1
    out = records[0]
    assert (out["question"], out["chosen"], out["rejected"], out["history"]) == (
        "What is it?",
        "A dog.",
        "A cat.",
        [],
    )
    assert out["images"] == [str(folder / ("VG_100K/7.jpg" if name == "ha-dpo" else "a.png"))]
    assert out["id"] == {"native": "x", "llava": "x", "vlfeedback": "llava-reasoning-1"}.get(name, "d:0")
    assert check(records, cache_dir=folder / "cache") == [0]


def test_parquet_with_image_bytes_and_many_row_groups(tmp_path):
    """The layout of openbmb's parquet files: image is {bytes, path}; check reads it in workers."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = PUBLISHED["rlaif-v"]
    rows = [raw | {"image": {"bytes": png(seed=i), "path": f"{i}.png"}, "chosen": f"A {i}."}
            for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=7)
    records = Records(tmp_path / "d.parquet")
    assert [records[i]["chosen"] for i in (299, 0, 150)] == ["A 299.", "A 0.", "A 150."]
    assert (
        records[3]["images"] == [png(seed=3)]
        and records[3]["id"] == "d:3"
        and records[3]["meta"]["idx"] == "3"
    )
    assert check(records, workers=2, cache_dir=tmp_path) == list(range(300))


def test_native_holds_several_images_or_none_history_and_rejected_images(folder):
    picture().save(folder / "b.png")
    records = Records(
        lines(
            folder / "d.jsonl",
            [
                pair(
                    image=["a.png", "b.png"], image_rejected="b.png", history=[["Hi", "Hello"]], meta={"k": 1}
                ),
                pair(1, image=None),
            ],
        )
    )
    assert records[0]["images"] == [str(folder / "a.png"), str(folder / "b.png")]
    assert records[0]["images_rejected"] == [str(folder / "b.png")] and records[0]["history"] == [
        ["Hi", "Hello"]
    ]
    assert records[0]["meta"]["k"] == 1
    assert records[1]["images"] == [] and records[1]["images_rejected"] is None


def test_earlier_turns_and_a_system_message_are_kept(folder):
    turns = [{"from": "system", "value": "Be brief."}, *TURNS, {"from": "human", "value": "Sure?"}]
    records = Records(lines(folder / "d.jsonl", [
        {"image": "a.png", "conversations": [*turns, {"from": "gpt", "value": "Yes."}],
         "rejected_conversations": [*turns, {"from": "gpt", "value": "No."}]}]))
    assert records[0]["history"] == [["Be brief.\n\nWhat is it?", "A dog."]]
    assert (records[0]["question"], records[0]["chosen"], records[0]["rejected"]) == ("Sure?", "Yes.", "No.")


def test_vlfeedback_keeps_llava_instruct_and_a_seeded_sample(folder, monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", 5)
    raw = PUBLISHED["vlfeedback"]
    tie = [{"annotations": mark(2), "model": m, "response": m} for m in "ab"]
    rows = [raw | {"id": f"llava-detail-{i}"} for i in range(9)] + [
        raw | {"id": "svit-1"},
        raw | {"id": "llavar-1"},
    ]
    rows.append(raw | {"id": "llava-conv-1", "completions": tie})
    records = Records(lines(folder / "d.jsonl", rows))
    assert records.dropped == {"not of LLaVA-Instruct": 2, "tied or no ratings": 1, "beyond a sample of 5": 4}
    ids = {records[i]["id"] for i in range(len(records))}
    shuffled = Records(lines(folder / "e.jsonl", rows[::-1]))
    assert len(ids) == 5 and ids == {
        shuffled[i]["id"] for i in range(5)
    }  # the sample is of ids, not of places
    assert records.where(len(records) - 1).startswith(f"{folder}/d.jsonl, line ")


def test_ha_dpo_descriptions_are_an_object_keyed_by_image_and_visual_genome_names_the_files(folder):
    (folder / "VG_100K_2").mkdir()
    picture().save(folder / "VG_100K_2/2331.jpg")
    (folder / "image_data.json").write_text(json.dumps(
        [{"image_id": 2331, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/2331.jpg"}]))
    answers = {"chosen": ["good 1", "good 2"], "rejected": ["bad 1", "bad 2"]}
    for text in (
        json.dumps({"2331": answers, "5": answers}),
        json.dumps({"2331": answers, "5": answers}, indent=1),
    ):
        (folder / "desc_data.json").write_text(text)
        records = Records(folder / "desc_data.json")
        assert len(records) == 2 and records[0]["images"] == [str(folder / "VG_100K_2/2331.jpg")]
        assert records[0]["chosen"][:4] == "good" and records[0]["rejected"][:3] == "bad"
        assert records[0] == records[0] and records[0]["question"] in data.DESCRIBE


def test_ha_dpo_leaves_out_what_was_answered_correctly(folder):
    raw = PUBLISHED["ha-dpo"]
    records = Records(lines(folder / "pope_data.json", [raw, raw | {"correct": True}]))
    assert len(records) == 1 and records.dropped == {"answered correctly": 1}


def test_unknown_keys_are_refused_with_what_was_found_and_what_is_known(folder):
    with pytest.raises(
        UserError, match=r"d.jsonl, line 1: no known format has the keys answer, picture; .*native.*trl"
    ):
        Records(lines(folder / "d.jsonl", [{"picture": "a.png", "answer": "A dog."}]))


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    (folder / "d.parquet").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        Records(folder / "d.parquet")


def test_spoilt_parquet_and_a_spoilt_image_list_are_sentences(folder):
    pytest.importorskip("pyarrow")
    (folder / "d.parquet").write_bytes(b"PAR1....")
    with pytest.raises(UserError, match="d.parquet is no readable parquet .*; fetch it again"):
        Records(folder / "d.parquet")
    (folder / "image_data.json").write_text("[1")
    with pytest.raises(UserError, match="image_data.json is not Visual Genome's"):
        Records(lines(folder / "d.jsonl", [PUBLISHED["ha-dpo"]]))


# ---- the index ----

def test_the_array_index_is_not_misled_by_strings(folder, monkeypatch):
    """Brackets, quotes and runs of backslashes in strings; every cut between chunks, down to one byte."""
    nasty = ['"', "\\", '\\"', "}]", '{"a": [', "\\\\\\", '"}, {"', "\n", "é\u2028", ""]
    rows = [pair(i, question=a + b, meta={"deep": [[{"k": a}]]}) for i, (a, b) in
            enumerate((a, b) for a in nasty for b in nasty)]
    for size in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(data._chunks, "__defaults__", (size,))
        for indent in (None, 1):
            (folder / "d.json").write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False))
            records = Records(folder / "d.json")
            assert len(records) == len(rows)
            for i in (0, 13, 57, 99):
                assert records[i]["question"] == rows[i]["question"].strip() and records[i]["id"] == f"p{i}"
        assert (
            records.where(1)
            == f"{folder}/d.json, line {2 + len(json.dumps(rows[0], indent=1).splitlines())} (id p1)"
        )


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_records(folder):
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(pair()).encode() + b"\r\n\r\n  \n"
                                     + json.dumps(pair(1)).encode())
    records = Records(folder / "d.jsonl")
    assert [r["id"] for r in records] == ["p0", "p1"] and records.where(
        1
    ) == f"{folder}/d.jsonl, line 4 (id p1)"


def test_opening_parses_nothing_and_holds_only_offsets(folder):
    """50,000 records of 1 KB; bench/open_records.py measures the million that may take seconds and 500 MB."""
    path = folder / "d.json"
    path.write_text(json.dumps([pair(i, chosen="x" * 1000) for i in range(50_000)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = Records(path)
    assert len(records) == 50_000 and records[49_999]["id"] == "p49999"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 << 10  # KiB; the file has 54 MiB


# ---- bad input: one sentence that says what, where, and the mend ----

@pytest.mark.parametrize("content", ["", "\n \n", "[]", " [ ]\n"])
def test_empty_data_is_a_sentence(folder, content):
    (folder / "d.json").write_text(content)
    with pytest.raises(UserError, match="d.json holds no records; give JSON lines"):
        Records(folder / "d.json")


def test_a_missing_file_and_a_folder_are_sentences(folder):
    with pytest.raises(UserError, match="no.jsonl could not be read .No such file.*; give a .jsonl"):
        Records(folder / "no.jsonl")
    with pytest.raises(UserError, match="Is a directory"):
        Records(folder)


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda t: t[:-30], 13),
        (lambda t: t.replace("},", "}", 1), 9),
        (lambda t: t + "x", 16),
        (lambda t: t.replace('"chosen": "A dog."', '"chosen": A dog."', 1), 6),
        (lambda t: t.replace("A cat.", 'A "cat".', 1), 7),
    ],
)
def test_a_broken_array_names_the_line(folder, capsys, spoil, line):
    path = folder / "d.json"
    path.write_text(spoil(json.dumps([pair(), pair(1)], indent=1)))
    try:
        out = faults(Records(path), capsys)[0]
    except UserError as error:  # so broken that not even an index stands
        out = [str(error)]
    assert len(out) == 1 and out[0].startswith(f"{path}, line {line}") and "broken JSON" in out[0], out


def test_an_array_of_other_things_is_a_sentence(folder):
    (folder / "d.json").write_text('["a", 3]')
    with pytest.raises(UserError, match="d.json, line 1: list instead of a record"):
        Records(folder / "d.json")


def test_faults_come_one_a_line_with_file_line_and_id(folder, capsys):
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff garbage")
    rows = [
        pair(0),
        pair(1, chosen=" "),
        pair(2, rejected=""),
        pair(3, rejected="A dog. "),
        pair(0),
        pair(5, image="no.png"),
        pair(6, image="bad.jpg"),
        '{"id": "p7", "question": ',
        {k: v for k, v in pair(8).items() if k != "chosen"},
        {k: v for k, v in pair(9).items() if k != "rejected"},
        pair(10, image="../x.png"),
        pair(11, chosen=["x"]),
        pair(12, image=5),
        pair(13, history=[["a"]]),
        pair(14, image_rejected="no.png"),
        pair(15),
    ]
    path = lines(folder / "d.jsonl", rows)
    out, end = faults(Records(path), capsys)
    expected = [
        "line 2 (id p1): the chosen response is empty",
        "line 3 (id p2): the rejected response is empty",
        "line 4 (id p3): chosen and rejected are identical",
        f"line 5 (id p0): the id is a duplicate of that at {path}, line 1",
        "line 6 (id p5): image no.png is missing",
        "line 7 (id p6): image bad.jpg is unreadable",
        "line 8: broken JSON",
        "line 9 (id p8): key 'chosen' is missing",
        "line 10 (id p9): key 'rejected' is missing",
        "line 11 (id p10): image ../x.png leaves the image root",
        "line 12 (id p11): chosen or rejected is not text",
        "line 13 (id p12): the image is int, not a path",
        "line 14 (id p13): not laid out as native is",
        "line 15 (id p14): image no.png is missing",
    ]
    assert len(out) == len(expected)
    for line, start in zip(out, expected, strict=True):
        assert line.startswith(f"{path}, {start}") and "\n" not in line
    assert end == f"14 of 16 records of {path} are faulty (listed above); mend them or pass --skip_bad"


def test_skip_bad_drops_the_faulty_with_counts(folder, capsys):
    records = Records(lines(folder / "d.jsonl", [pair(0), pair(1, chosen=""), pair(0), pair(3, rejected="")]))
    assert check(records, skip_bad=True, cache_dir=folder) == [0]
    last = capsys.readouterr().err.splitlines()[-1]
    counts = "2 empty response, 1 duplicate id"
    assert last == f"--skip_bad left out 3 of 4 records of {folder}/d.jsonl ({counts})"


def test_skip_bad_stops_where_nothing_is_left(folder, capsys):
    assert (
        "no usable record"
        in faults(Records(lines(folder / "d.jsonl", [pair(chosen="")])), capsys, skip_bad=True)[1]
    )


def test_a_first_line_that_is_broken_does_not_hide_the_rest(folder, capsys):
    records = Records(lines(folder / "d.jsonl", ["{", pair(1)]))
    assert records.format == "native" and check(records, skip_bad=True, cache_dir=folder) == [1]


def test_pairs_without_rejected_or_image_pass_where_the_loss_does_not_need_them(folder, capsys):
    row = {"id": "x", "question": "?", "chosen": "A dog."}
    records = Records(lines(folder / "d.jsonl", [row]))
    assert check(records, needs_rejected=False, cache_dir=folder) == [0]
    assert (
        "no image and this loss needs one"
        in faults(records, capsys, needs_rejected=False, needs_image=True)[0][0]
    )


@pytest.mark.parametrize(
    "name", ["../x.png", "sub/../../x.png", "/etc/hostname", "link.png", "dir/x.png", "a\0.png"]
)
def test_a_path_that_leaves_the_image_root_is_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    picture().save(tmp_path / "x.png")
    (root / "link.png").symlink_to(tmp_path / "x.png")
    (root / "dir").symlink_to(tmp_path)
    records = Records(lines(root / "d.jsonl", [pair(image=name)]))
    with pytest.raises(UserError, match=r"d.jsonl, line 1 \(id p0\): .*(leaves the image root|null)"):
        records[0]


def test_a_path_that_stays_inside_is_not_refused(folder, tmp_path):
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(folder / "a.png")
    rows = [pair(i, image=name) for i, name in enumerate(["link.png", "sub/../a.png", str(folder / "a.png")])]
    assert {r["images"][0] for r in Records(lines(folder / "d.jsonl", rows))} == {str(folder / "a.png")}
    records = Records(lines(folder / "sub" / "d.jsonl", rows[2:]), image_root=folder)
    assert records[0]["images"] == [str(folder / "a.png")]


def test_the_check_runs_once_until_data_or_an_image_changes(folder, monkeypatch, capsys):
    path = lines(folder / "d.jsonl", [pair(0), pair(1, image="no.png")])
    decoded = []
    monkeypatch.setattr(data, "read_image", lambda image: decoded.append(image) or read_image(image))
    first = faults(Records(path), capsys)
    assert len(decoded) == 2 and faults(Records(path), capsys) == first and len(decoded) == 2  # remembered
    picture().save(folder / "no.png")  # a fault is mended
    assert check(Records(path), cache_dir=folder / "cache") == [0, 1] and len(decoded) == 4
    assert check(Records(path), cache_dir=folder / "cache") == [0, 1] and len(decoded) == 4
    (folder / "a.png").write_bytes(b"broken since")  # an image changes
    assert len(faults(Records(path), capsys)[0]) == 1 and len(decoded) == 6
    lines(path, [pair(0, image="no.png")])  # the data change
    assert check(Records(path), cache_dir=folder / "cache") == [0] and len(decoded) == 7


def test_a_cache_that_cannot_be_written_or_was_torn_is_done_without(folder):
    records = Records(lines(folder / "d.jsonl", [pair()]))
    assert check(records, cache_dir=folder / "a.png" / "x") == [0]
    check(records, cache_dir=folder / "cache")
    memory, = (folder / "cache").iterdir()
    memory.write_bytes(memory.read_bytes()[:-9])
    assert check(records, cache_dir=folder / "cache") == [0]


def test_a_disk_that_fills_while_checking_costs_only_the_memory(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    records = Records(lines(folder / "d.jsonl", [pair()]))
    monkeypatch.setattr(os, "write", full)
    assert check(records, cache_dir=folder / "cache") == [0] and os.listdir(folder / "cache") == []


def test_workers_find_what_one_process_finds(folder, capsys):
    rows = [
        pair(i % 590, rejected="" if i % 97 == 0 else "A cat.", image="no.png" if i % 101 == 0 else "a.png")
        for i in range(600)
    ]
    records = Records(lines(folder / "d.jsonl", rows))
    alone = faults(records, capsys, workers=0, cache_dir=folder / "0")
    assert len(alone[0]) == 7 + 6 + 10 and faults(records, capsys, workers=2, cache_dir=folder / "2") == alone


def test_real_pds_dpo_names_its_two_empty_responses(tmp_path, capsys):
    records = Records(need(SHARED / "real/pds10/step3_sanity.json"))
    out, _ = faults(records, capsys, cache_dir=tmp_path)
    assert records.format == "llava" and len(records) == 10 and len(out) == 2
    assert "line 26 (id art-2): the rejected response is empty" in out[0]
    assert "line 50 (id art-3): the rejected response is empty" in out[1]
    assert check(records, skip_bad=True, cache_dir=tmp_path) == [0, 3, 4, 5, 6, 7, 8, 9]
    assert records[0]["question"].startswith("How does the use of bold strokes")


def test_real_mdpo_names_its_two_absent_images(tmp_path, capsys):
    records = Records(need(SHARED / "real/mdpo/sample_data.json"))
    out, _ = faults(records, capsys, cache_dir=tmp_path)
    assert records.format == "mdpo" and len(out) == 2
    assert "line 2 (id sample_data:0): image images/llava-reasoning-3730.jpg is missing" in out[0]
    assert "line 8 (id sample_data:1): image images/llava-reasoning-5951.jpg is missing" in out[1]
    assert records[0]["question"] == (
        "How might the atmosphere of this photo appear to be, and what is one possible "
        "reason these people have gathered outside?"
    )


# ---- rejected images ----

def same(a, b):
    return a.size == b.size and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("strategy", data.REJECTED)
def test_a_rejected_image_depends_on_seed_strategy_and_id_alone(strategy):
    image, other = picture((61, 47)), picture((30, 30), 1)
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
        assert not same(first, rejected_image(strategy, image, 0, "a", other, epoch=1))


@pytest.mark.parametrize("strategy", [s for s in data.REJECTED if s != "random"])
@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (33, 33)])
def test_any_size_of_image_gives_a_rejected_image_of_that_size(strategy, size):
    for i in range(5):
        assert rejected_image(strategy, picture(size), 0, str(i)).size == size


@pytest.mark.parametrize(
    "strategy, low, high", [("crop", 0.01, 0.2), ("crop20-50", 0.2, 0.5), ("crop80-100", 0.8, 1.0)]
)
@pytest.mark.parametrize("size", [(336, 336), (640, 427), (400, 1000)])
def test_a_crop_keeps_its_share_of_the_area_within_the_image(monkeypatch, strategy, low, high, size):
    """A thousand draws a size: the share (to a rounding of pixels), aspect, place, and size after."""
    boxes, image = [], Image.new("RGB", size)
    monkeypatch.setattr(image, "crop", lambda box: boxes.append(box) or Image.new("RGB", (1, 1)))
    for i in range(1000):
        assert rejected_image(strategy, image, 0, str(i)).size == size
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
    assert rejected_image("random", picture(), 0, "a", other) is other
    draws = [data.other_index(0, f"p{i}", i % 5, 5) for i in range(500)]
    assert all(0 <= j < 5 and j != i % 5 for i, j in enumerate(draws)) and min(np.bincount(draws)) > 60
    assert draws == [data.other_index(0, f"p{i}", i % 5, 5) for i in range(500)]
    assert {data.other_index(0, "a", 0, 5, attempt=k) for k in range(30)} == {1, 2, 3, 4}
    with pytest.raises(UserError, match="needs two records or more"):
        data.other_index(0, "a", 0, 1)


def test_an_unknown_strategy_is_a_sentence():
    with pytest.raises(UserError, match="--image_rejected blur is not one of crop, crop20-50"):
        rejected_image("blur", picture(), 0, "a")


# ---- token ids ----

def test_truncation_shortens_responses_only_and_counts():
    pair = Pair("a", [1] * 10, [1] * 8, [2] * 5, [3] * 9)
    cut, n = data.truncate(pair, 16)
    assert (cut.prompt, cut.prompt_rejected, cut.chosen, cut.rejected, n) == (
        [1] * 10,
        [1] * 8,
        [2] * 5,
        [3] * 6,
        3,
    )
    assert pair.rejected == [3] * 9 and data.truncate(pair, 19) == (pair, 0)


def test_a_prompt_that_leaves_no_room_is_a_sentence():
    with pytest.raises(UserError, match="the prompt of a has 10 tokens.*max_length 10; raise it or drop"):
        data.truncate(Pair("a", [1] * 10, [], [2], [3]), 10)
