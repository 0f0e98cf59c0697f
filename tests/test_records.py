"""Every public format, the index behind it and the full check: what training/records.py promises."""
import io
import json
import re
import resource
import sys

import pytest
from conftest import SHARED, need, pairs_of, picture

from data import UserError, read_image
from training.records import DESCRIBE, Records, check


def png(seed):
    out = io.BytesIO()
    picture(seed, (8, 8)).save(out, "PNG")
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
    picture(0).save(tmp_path / "a.png")
    return tmp_path


def faults(records, capsys, **options):
    """The lines that the check writes, and the sentence it ends with."""
    capsys.readouterr()
    with pytest.raises(UserError) as end:
        check(records, **options)
    return capsys.readouterr().err.splitlines(), str(end.value)


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
    picture(0).save(folder / "VG_100K/7.jpg")
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
    assert check(records) == [0]


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
    )
    assert check(records) == list(range(300))


def test_native_holds_several_images_or_none_history_and_rejected_images(folder):
    picture(0).save(folder / "b.png")
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
    assert records[1]["images"] == records[1]["images_rejected"] == []


def test_earlier_turns_and_a_system_message_are_kept(folder):
    turns = [{"from": "system", "value": "Be brief."}, *TURNS, {"from": "human", "value": "Sure?"}]
    records = Records(lines(folder / "d.jsonl", [
        {"image": "a.png", "conversations": [*turns, {"from": "gpt", "value": "Yes."}],
         "rejected_conversations": [*turns, {"from": "gpt", "value": "No."}]}]))
    assert records[0]["history"] == [["Be brief.\n\nWhat is it?", "A dog."]]
    assert (records[0]["question"], records[0]["chosen"], records[0]["rejected"]) == ("Sure?", "Yes.", "No.")


def test_vlfeedback_leaves_out_ties(folder):
    raw = PUBLISHED["vlfeedback"]
    tie = [{"annotations": mark(2), "model": m, "response": m} for m in "ab"]
    rows = [raw | {"id": "a"}, raw | {"id": "b", "completions": tie}, raw | {"id": "c"}]
    records = Records(lines(folder / "d.jsonl", rows))
    assert [r["id"] for r in pairs_of(records)] == ["a", "c"]
    assert records.where(1) == f"{folder}/d.jsonl, line 3 (id c)"


def test_ha_dpo_descriptions_are_an_object_keyed_by_image_and_visual_genome_is_two_folders(folder):
    (folder / "VG_100K_2").mkdir()
    picture(0).save(folder / "VG_100K_2/2331.jpg")
    answers = {"chosen": ["good 1", "good 2"], "rejected": ["bad 1", "bad 2"]}
    for text in (
        json.dumps({"2331": answers, "5": answers}),
        json.dumps({"2331": answers, "5": answers}, indent=1),
    ):
        (folder / "desc_data.json").write_text(text)
        records = Records(folder / "desc_data.json")
        assert [r["images"] for r in pairs_of(records)] == [[str(folder / "VG_100K_2/2331.jpg")],
                                                  [str(folder / "VG_100K/5.jpg")]]
        assert records[0]["chosen"][:4] == "good" and records[0]["rejected"][:3] == "bad"
        assert records[0] == records[0] and records[0]["question"] in DESCRIBE


def test_ha_dpo_leaves_out_what_was_answered_correctly(folder, capsys):
    (folder / "VG_100K").mkdir()
    picture(0).save(folder / "VG_100K/7.jpg")
    raw = PUBLISHED["ha-dpo"]
    records = Records(lines(folder / "pope_data.json", [raw, raw | {"correct": True}]))
    assert len(records) == 1 and check(records) == [0]
    assert capsys.readouterr().err == f"1 of 2 records of {folder}/pope_data.json are pairs\n"


def test_unknown_keys_are_refused_with_what_was_found_and_what_is_known(folder):
    known = r"line 1: no known format has the keys answer, picture; .*native, trl .docs/data.md"
    with pytest.raises(UserError, match=known):
        Records(lines(folder / "d.jsonl", [{"picture": "a.png", "answer": "A dog."}]))


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    (folder / "d.parquet").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        Records(folder / "d.parquet")


def test_spoilt_parquet_is_a_sentence(folder):
    pytest.importorskip("pyarrow")
    (folder / "d.parquet").write_bytes(b"PAR1....")
    with pytest.raises(UserError, match="d.parquet is not readable parquet .*; fetch it again"):
        Records(folder / "d.parquet")


# ---- the index ----

def test_the_lines_of_an_array_are_not_misled_by_strings(folder):
    """Brackets, quotes and runs of backslashes in strings."""
    nasty = ['"', "\\", '\\"', "}]", '{"a": [', "\\\\\\", '"}, {"', "\n", "é\u2028", ""]
    rows = [pair(i, question=a + b, meta={"deep": [[{"k": a}]]}) for i, (a, b) in
            enumerate((a, b) for a in nasty for b in nasty)]
    for indent in (None, 1):
        (folder / "d.json").write_text("\ufeff" + json.dumps(rows, indent=indent, ensure_ascii=False))
        records = Records(folder / "d.json")
        assert len(records) == len(rows)
        for i in (0, 13, 57, 99):
            assert records[i]["question"] == rows[i]["question"].strip() and records[i]["id"] == f"p{i}"
            above = 1 + sum(len(json.dumps(row, indent=1).splitlines()) for row in rows[:i]) if indent else 0
            assert records.where(i) == f"{folder}/d.json, line {1 + above} (id p{i})"


def test_lines_are_found_in_any_order_between_blank_ones(folder):
    rows = [pair(0, chosen="é"), "", pair(1, chosen="x" * 99), " ", pair(2)]
    records = Records(lines(folder / "d.jsonl", rows))
    assert [records[i]["id"] for i in (2, 0, 1)] == ["p2", "p0", "p1"] and len(records) == 3
    assert records.where(2) == f"{folder}/d.jsonl, line 5 (id p2)"


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_no_records(folder):
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(pair()).encode() + b"\r\n\r\n  \n"
                                     + json.dumps(pair(1)).encode())
    records = Records(folder / "d.jsonl")
    assert [r["id"] for r in pairs_of(records)] == ["p0", "p1"]
    assert records.where(1) == f"{folder}/d.jsonl, line 4 (id p1)"


def test_opening_parses_nothing_and_holds_only_offsets(folder):
    """50,000 records of 1 KB; bench/open_records.py measures the million that may take seconds and 500 MB."""
    path = lines(folder / "d.jsonl", [pair(i, chosen="x" * 1000) for i in range(50_000)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = Records(path)
    assert len(records) == 50_000 and records[49_999]["id"] == "p49999"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 << 10  # KiB; the file has 54 MiB


# ---- bad input: one sentence that says what, where, and the fix ----

@pytest.mark.parametrize("content", ["", "\n \n", "[]", " [ ]\n"])
def test_empty_data_is_a_sentence(folder, content):
    (folder / "d.json").write_text(content)
    with pytest.raises(UserError, match="d.json holds no records; give JSON lines"):
        Records(folder / "d.json")


def test_a_missing_file_and_a_folder_are_sentences(folder):
    with pytest.raises(UserError, match="no.jsonl could not be read .No such file.*; check the path"):
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
    with pytest.raises(UserError, match="d.json, line 1: str instead of a record"):
        Records(folder / "d.json")


def test_faults_come_one_a_line_with_file_line_and_id(folder, capsys, monkeypatch):
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
    few, _ = faults(Records(path), capsys)
    monkeypatch.setattr("evaluation.stats.FEW", 99)
    out, end = faults(Records(path), capsys)
    assert few == [*out[:5], "and 9 more"]
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
        "line 11 (id p10): image: ../x.png leaves the folder",
        "line 12 (id p11): chosen or rejected is not text",
        "line 13 (id p12): the image is int, not a path",
        "line 14 (id p13): the turns are not user, assistant",
        "line 15 (id p14): image no.png is missing",
    ]
    assert len(out) == len(expected)
    for line, start in zip(out, expected, strict=True):
        assert line.startswith(f"{path}, {start}") and "\n" not in line
    assert end == f"14 of 16 records of {path} are faulty (listed above); fix them or pass --skip_bad"


def test_skip_bad_drops_the_faulty_with_counts(folder, capsys):
    records = Records(lines(folder / "d.jsonl", [pair(0), pair(1, chosen=""), pair(0), pair(3, rejected="")]))
    assert check(records, skip_bad=True) == [0]
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
    assert records.format == "native" and check(records, skip_bad=True) == [1]


def test_pairs_without_an_image_pass_where_the_loss_does_not_need_one(folder, capsys):
    records = Records(lines(folder / "d.jsonl", [pair(image=None)]))
    assert check(records) == [0]
    assert "no image and this loss needs one" in faults(records, capsys, needs_image=True)[0][0]


@pytest.mark.parametrize(
    "name", ["../x.png", "sub/../../x.png", "/etc/hostname", "link.png", "dir/x.png", "a\0.png"]
)
def test_a_path_that_leaves_the_image_root_is_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    picture(0).save(tmp_path / "x.png")
    (root / "link.png").symlink_to(tmp_path / "x.png")
    (root / "dir").symlink_to(tmp_path)
    records = Records(lines(root / "d.jsonl", [pair(image=name)]))
    said = r"d.jsonl, line 1 \(id p0\): .*(leaves the folder .*--image_root|null)"
    with pytest.raises(UserError, match=said):
        records[0]


def test_a_path_that_stays_inside_is_not_refused(folder, tmp_path):
    (folder / "sub").mkdir()
    (folder / "link.png").symlink_to(folder / "a.png")
    rows = [pair(i, image=name) for i, name in enumerate(["link.png", "sub/../a.png", str(folder / "a.png")])]
    records = Records(lines(folder / "d.jsonl", rows))
    assert {r["images"][0] for r in pairs_of(records)} == {str(folder / "a.png")}
    records = Records(lines(folder / "sub" / "d.jsonl", rows[2:]), image_root=folder)
    assert records[0]["images"] == [str(folder / "a.png")]


def test_threads_find_every_fault_in_order_and_decode_every_image_once(folder, monkeypatch, capsys):
    rows = [
        pair(i % 590, rejected="" if i % 97 == 0 else "A cat.", image="no.png" if i % 101 == 0 else "a.png")
        for i in range(600)
    ]
    records = Records(lines(folder / "d.jsonl", rows))
    decoded = []
    monkeypatch.setattr("training.records.read_image",
                        lambda image: decoded.append(image) or read_image(image))
    monkeypatch.setattr("evaluation.stats.FEW", 99)
    out, _ = faults(records, capsys)
    places = [int(re.search(r"line (\d+)", line)[1]) for line in out]
    assert len(out) == 7 + 6 + 10 and places == sorted(places)
    assert sorted(decoded) == [str(folder / "a.png"), str(folder / "no.png")]


def test_real_pds_dpo_names_its_two_empty_responses(tmp_path, capsys):
    records = Records(need(SHARED / "real/pds10/step3_sanity.json"))
    out, _ = faults(records, capsys)
    assert records.format == "llava" and len(records) == 10 and len(out) == 2
    assert "line 26 (id art-2): the rejected response is empty" in out[0]
    assert "line 50 (id art-3): the rejected response is empty" in out[1]
    assert check(records, skip_bad=True) == [0, 3, 4, 5, 6, 7, 8, 9]
    assert records[0]["question"].startswith("How does the use of bold strokes")


def test_real_mdpo_names_its_two_absent_images(tmp_path, capsys):
    records = Records(need(SHARED / "real/mdpo/sample_data.json"))
    out, _ = faults(records, capsys)
    assert records.format == "mdpo" and len(out) == 2
    assert "line 2 (id sample_data:0): image images/llava-reasoning-3730.jpg is missing" in out[0]
    assert "line 8 (id sample_data:1): image images/llava-reasoning-5951.jpg is missing" in out[1]
    assert records[0]["question"] == (
        "How might the atmosphere of this photo appear to be, and what is one possible "
        "reason these people have gathered outside?"
    )


def test_as_many_rejected_images_as_images(tmp_path, capsys):
    """A prompt has one place an image: another number of rejected images would not fit."""
    from PIL import Image
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    row = {"id": "x", "question": "q", "chosen": "yes", "rejected": "no", "image": "a.png"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row | {"image_rejected": ["b.png", "c.png"]}) + "\n"
                    + json.dumps(row | {"id": "y", "image_rejected": "b.png"}) + "\n")
    assert check(Records(path), skip_bad=True) == [1]
    assert "differ in number" in capsys.readouterr().err
