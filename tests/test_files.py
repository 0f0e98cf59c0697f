"""What users bring as files: each fixture is written by the library itself, and reads as the native file."""
import base64
import gzip
import io
import json

import numpy as np
import pytest
from conftest import SHARED, need, pairs_of, picture

from data import UserError, read_image
from training.records import Records, check

N = 5


def png(i):
    out = io.BytesIO()
    picture(i, (8, 8)).save(out, "PNG")
    return out.getvalue()


def pair(i, **changes):
    return {"id": f"p{i}", "image": f"{i}.png", "question": "What is it?", "chosen": f"Two cups {i}.",
            "rejected": "A vase."} | changes


def coded(i):
    return base64.b64encode(png(i)).decode()


ROWS = [pair(i) for i in range(N)]
EMBEDDED = [pair(i, image={"bytes": png(i), "path": f"{i}.png"}) for i in range(N)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def folder(tmp_path):
    for i in range(N):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "d.jsonl").write_text(TEXT)
    return tmp_path


def read(path, root):
    """All pairs of a file, their images as pixels; each of them passed the check."""
    records = Records(path, root)
    found = []
    for i in check(records):
        record = records[i]
        del record["pairs"]
        for name in ("images", "images_rejected"):
            record[name] = [np.asarray(read_image(image)).tolist() for image in record[name]]
        found.append(record)
    return found


# ---- a file of each kind: f(folder, its path) writes it ----
def lines(rows):
    return lambda folder, path: path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def packed(text):
    return lambda folder, path: path.write_bytes(gzip.compress(text.encode()))


def parquet(rows):
    def write(folder, path):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return write


def shards(write, ending):
    """Three files in a folder, in the order of their names, beside others that are none."""
    def made(folder, path):
        path.mkdir()
        (path / "README.md").write_text("What this is.")
        for n, some in enumerate((ROWS[:2], ROWS[2:3], ROWS[3:])):
            write(some)(folder, path / f"train-0000{n}-of-00003.{ending}")
    return made


def saved(embedded, files=1):
    """datasets.Dataset.save_to_disk, with images as its own feature or as paths."""
    def made(folder, path):
        datasets = pytest.importorskip("datasets")
        rows = EMBEDDED if embedded else ROWS
        dataset = datasets.Dataset.from_list(rows)
        if embedded:
            dataset = dataset.cast_column("image", datasets.Image())
        dataset.save_to_disk(path, num_shards=files)
        (path / "cache-0123456789abcdef.arrow").write_bytes(b"what dataset.map leaves")
    return made


def exported(kind):
    """What datasets writes with to_json and to_parquet."""
    def made(folder, path):
        datasets = pytest.importorskip("datasets")
        dataset = datasets.Dataset.from_list(EMBEDDED if kind == "parquet" else ROWS)
        if kind == "parquet":
            dataset = dataset.cast_column("image", datasets.Image())
        getattr(dataset, f"to_{kind}")(path)
    return made


KINDS = {
    "d.jsonl.gz": packed(TEXT), "d.json.gz": packed(json.dumps(ROWS, indent=1)),
    "base64.jsonl": lines([pair(i, image=coded(i)) for i in range(N)]),
    "uri.jsonl": lines([pair(i, image=[f"data:image/png;base64,{coded(i)}"]) for i in range(N)]),
    "bytes.jsonl": lines([pair(i, image={"bytes": coded(i), "path": None}) for i in range(N)]),
    "lines": shards(lines, "jsonl"), "parquets": shards(parquet, "parquet"),
    "gzips": shards(lambda rows: packed("".join(json.dumps(row) + "\n" for row in rows)), "jsonl.gz"),
    "saved": saved(False), "saved-images": saved(True), "saved-shards": saved(True, 3),
    "exported.parquet": exported("parquet"), "exported.jsonl": exported("json"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_reads_as_the_native_one(folder, name):
    KINDS[name](folder, folder / name)
    assert read(folder / name, folder) == read(folder / "d.jsonl", folder)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_content_of_several_types_is_read_from_what_datasets_stores_as_json(folder, ending):
    """A message's content is a text here and a list of parts there."""
    datasets = pytest.importorskip("datasets")
    rows = []
    for row in ROWS:
        parts = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        rows.append({"id": row["id"], "images": [row["image"]], "prompt": turns,
                     "chosen": assistant(row["chosen"]), "rejected": assistant(row["rejected"])})
    lines(rows)(folder, folder / "s.jsonl")
    dataset = datasets.Dataset.from_json(str(folder / "s.jsonl"), cache_dir=folder / "cache")
    assert "Json" in str(dataset.features)
    save = dataset.to_parquet if ending == "parquet" else dataset.save_to_disk
    save(folder / f"s.{ending}")
    assert read(folder / f"s.{ending}", folder) == read(folder / "s.jsonl", folder)


def test_without_an_id_the_file_and_its_gzip_name_their_pairs_alike(folder):
    rows = [{key: value for key, value in row.items() if key != "id"} for row in ROWS]
    lines(rows)(folder, folder / "n.jsonl")
    packed((folder / "n.jsonl").read_text())(folder, folder / "n.jsonl.gz")
    zipped, plain = (pairs_of(Records(folder / name)) for name in ("n.jsonl.gz", "n.jsonl"))
    assert [r["id"] for r in zipped] == [r["id"] for r in plain]


def test_a_fault_in_a_shard_or_a_gzip_is_named_by_its_own_file_and_line(folder, capsys):
    rows = [pair(0), pair(1, rejected="")]
    (folder / "many").mkdir()
    lines([pair(2)])(folder, folder / "many" / "a.jsonl")
    lines(rows)(folder, folder / "many" / "b.jsonl")
    packed("".join(json.dumps(row) + "\n" for row in rows))(folder, folder / "g.jsonl.gz")
    packed(json.dumps(rows, indent=1))(folder, folder / "g.json.gz")
    for path, place in (("many", "many/b.jsonl, line 2"), ("g.jsonl.gz", "g.jsonl.gz, line 2"),
                        ("g.json.gz", "g.json.gz, line 9")):
        path = folder / path
        capsys.readouterr()
        with pytest.raises(UserError):
            check(Records(path, folder))
        assert capsys.readouterr().err.startswith(f"{folder}/{place} (id p1): the rejected response is empty")
        assert len(check(Records(path, folder), skip_bad=True)) == len(Records(path)) - 1


@pytest.mark.parametrize("names", [[], ["a.parquet", "b.jsonl"], ["train-0.jsonl", "test-0.jsonl"],
                                   ["train.json", "validation.json"], ["dataset_dict.json"]])
def test_a_folder_without_shards_of_one_kind_and_split_is_refused(folder, names):
    (folder / "many").mkdir()
    for name in names:
        (folder / "many" / name).write_text(TEXT)
    with pytest.raises(UserError, match="many could not be read .*: give a file, or a folder of"):
        Records(folder / "many")


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08broken", gzip.compress(TEXT.encode())[:-9],
                                     b"\xff\xff\xff\xff no arrow", b"\xff\xff\xff\xff"])
def test_a_torn_file_is_a_sentence(folder, content):
    (folder / "x").write_bytes(content)
    with pytest.raises(UserError, match="x (cannot be unpacked|is not readable).*: fetch it|fetch it again"):
        Records(folder / "x")


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_damaged_record_of_a_table_is_a_fault_of_its_own(folder, capsys, kind):
    """The bytes of a text that are none in UTF-8, in one record."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table, path = pa.Table.from_pylist(ROWS), folder / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    else:
        with pa.ipc.new_stream(path, table.schema) as out:
            out.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"Two cups 3.", b"Two cup\xff 3."))
    records = Records(path, folder)
    assert check(records, skip_bad=True) == [0, 1, 2, 4]
    assert f"{path}, record 4 is not readable" in capsys.readouterr().err


def test_arrow_without_pyarrow_says_what_to_install(folder, monkeypatch):
    import sys
    (folder / "d.arrow").write_bytes(b"\xff\xff\xff\xff....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="d.arrow needs pyarrow: pip install pyarrow"):
        Records(folder / "d.arrow")


# ---- several rejected responses ----
TURNS = [{"role": "user", "content": "<image>What is it?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


SEVERAL = {
    "native": pair(1, rejected=["A dog.", "A cat.", "A car."]),
    "trl": {"id": "p1", "images": ["1.png"], "prompt": TURNS, "chosen": assistant("Two cups 1."),
            "rejected": [assistant("A dog."), assistant("A cat."), assistant("A car.")]},
    "trl, implicit": {"id": "p1", "images": ["1.png"], "chosen": TURNS + assistant("Two cups 1."),
                      "rejected": [TURNS + assistant(text) for text in ("A dog.", "A cat.", "A car.")]},
    "ms-swift": {"id": "p1", "images": ["1.png"], "messages": TURNS + assistant("Two cups 1."),
                 "rejected_response": ["A dog.", "A cat.", "A car."]},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_rejected_responses_are_one_pair_each(folder, name):
    row = SEVERAL[name]
    key = "rejected_response" if name == "ms-swift" else "rejected"
    plain = [{"role": "assistant", "content": "A vase."}] if "trl" in name else "A vase."
    first = row | {"id": "p0", key: TURNS + plain if "implicit" in name else plain}
    lines([first, row, first | {"id": "p2"}])(folder, folder / "s.jsonl")
    found = read(folder / "s.jsonl", folder)
    assert [r["id"] for r in found] == ["p0", "p1#1", "p1#2", "p1#3", "p2"]
    assert [r["rejected"] for r in found] == ["A vase.", "A dog.", "A cat.", "A car.", "A vase."]
    assert {r["chosen"] for r in found[1:4]} == {"Two cups 1."}
    assert found[1]["images"] == found[3]["images"]
    assert [r["id"] for r in pairs_of(Records(folder / "s.jsonl"))] == [r["id"] for r in found]


def test_a_faulty_one_of_several_is_named_and_dropped_alone(folder, capsys):
    rows = [pair(0), pair(1, rejected=["A dog.", " ", "A car."]), pair(2, rejected=[])]
    lines(rows)(folder, folder / "s.jsonl")
    records = Records(folder / "s.jsonl")
    assert [records[i]["id"] for i in check(records, skip_bad=True)] == ["p0", "p1#1", "p1#3"]
    said = capsys.readouterr().err
    assert "line 2 (id p1#2): the rejected response is empty" in said
    assert "line 3 (id p2): the rejected response is empty" in said
    assert "left out 2 of 5 records" in said
    records = Records(folder / "s.jsonl", rejected=False)                          # --loss sft
    assert [records[i]["id"] for i in check(records)] == ["p0", "p1", "p2"]


# ---- what else a record says ----
def test_a_system_text_of_its_own_leads_the_first_question(folder):
    """As LLaMA-Factory and ms-swift have it."""
    rows = [{"system": "Be brief.", "conversations": [{"from": "human", "value": "<image>What is it?"}],
             "chosen": {"from": "gpt", "value": "A dog."}, "rejected": {"from": "gpt", "value": "A cat."},
             "images": ["0.png"]}]
    lines(rows)(folder, folder / "s.jsonl")
    assert Records(folder / "s.jsonl")[0]["question"] == "Be brief.\n\nWhat is it?"
    rows = [{"system": "Be brief.", "messages": TURNS + assistant("A dog."), "images": ["0.png"],
             "rejected_messages": TURNS + assistant("A cat.")}]
    lines(rows)(folder, folder / "m.jsonl")
    record = Records(folder / "m.jsonl")[0]
    assert record["question"] == "Be brief.\n\nWhat is it?" and record["rejected"] == "A cat."


@pytest.mark.parametrize("changes, says", [
    ({"tools": '[{"name": "search"}]'}, "tells of tools"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "1.png"}]}]}, "names its image"),
    ({"prompt": [{"role": "user", "content": "What?", "images": ["1.png"]}]}, "names its image")])
def test_what_is_not_read_is_refused(folder, changes, says):
    lines([SEVERAL["trl"] | {"rejected": "A cat."} | changes])(folder, folder / "s.jsonl")
    with pytest.raises(UserError, match=rf"line 1 \(id p1\): .*{says}"):
        Records(folder / "s.jsonl")[0]


# ---- links ----
def test_links_may_lead_out_where_they_are_followed_and_nothing_else_may(folder, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    (disk / "0.png").write_bytes(png(0))
    (folder / "coco").symlink_to(disk)
    lines([pair(0, image="coco/0.png"), pair(1, image=f"{disk}/0.png"), pair(2, image="coco/../../0.png")])(
        folder, folder / "s.jsonl")
    with pytest.raises(UserError, match="leaves the folder .*--follow_links"):
        Records(folder / "s.jsonl")[0]
    records = Records(folder / "s.jsonl", follow_links=True)
    assert read_image(records[0]["images"][0]).tobytes() == picture(0, (8, 8)).tobytes()
    assert check(records, skip_bad=True) == [0]


def test_shared_links_are_followed(tmp_path):
    case = need(SHARED / "cases" / "training" / "symlinked-images")
    for name in ("coco", "vg"):
        (tmp_path / name).symlink_to(case / name)
    (tmp_path / "pairs.jsonl").write_bytes((case / "pairs.jsonl").read_bytes())
    assert len(check(Records(tmp_path / "pairs.jsonl", follow_links=True))) == 2
    for skip_bad, says in ((False, "2 of 2 records of .* are faulty"), (True, "has no usable record")):
        with pytest.raises(UserError, match=says):
            check(Records(tmp_path / "pairs.jsonl"), skip_bad=skip_bad)


# ---- messages ----
LONG = "A long text that somebody put where none belongs. " * 200


@pytest.mark.parametrize("row", [pair(0, image=LONG), pair(0, id=LONG, rejected=""), {LONG: 1},
                                 pair(0, image=[{LONG: 1}]), pair(0, chosen={"role": LONG, "content": ""}),
                                 {"conversations": [], "output_1": "", "output_2": "", "preference": LONG}])
def test_a_message_prints_at_most_200_characters_of_data(folder, capsys, row):
    path = folder / "l.jsonl"
    lines([row])(folder, path)
    with pytest.raises(UserError) as end:
        check(Records(path))
    said = capsys.readouterr().err + str(end.value)
    assert said.count("somebody put") <= 4 and len(said) < 700
