"""LLaMA-Factory, ms-swift and TRL read their own files in tests/data, and find the pairs of the native file,
images by pixel; so do we.

ms-swift-*.jsonl are what ms-swift 4.6.0 writes: load_dataset([FILE], strict=True)[0].to_json(FILE,
force_ascii=False). LLaMA-Factory 0.9.5 and TRL 1.16.0 write no such files: theirs are in the layout of their
documentation. TRL is in requirements-dev.txt; for the others: pip install --no-deps llamafactory==0.9.5
ms-swift==4.6.0, and what they import. Where they are absent, their tests are skipped.
"""
import hashlib
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import pairs_of, picture
from PIL import Image

import data
from training.records import Records

DATA = Path(__file__).parent / "data"
PAIRS = [
    {"image": ["0.png"], "history": [], "question": "<image>What is it?", "chosen": "Two cups.",
     "rejected": "A vase."},
    {"image": ["1.png", "2.png"], "system": "Be brief.", "history": [["<image>What is it?", "A cup."]],
     "question": "And in <image>, on the left?", "chosen": "Two cups.\nThey are red.", "rejected": "A vase."},
    {"image": [], "history": [], "question": "What is a «cup»?", "chosen": "A jar.", "rejected": "A vase."}]
OTHERS = [PAIRS[0] | {"image_rejected": ["3.png"]}, PAIRS[1] | {"image_rejected": ["3.png", "0.png"]}]


# ---- a library's reading of a file in the folder: native rows, their images as `pixels` ----
def pixels(image):
    """What tells one picture from another: a difference of long lists takes pytest minutes to print."""
    image = image if isinstance(image, Image.Image) else data.read_image(image)
    return image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()


def row(system, turns, chosen, rejected, images):
    """A native row of a prompt's turns and two responses."""
    *before, question = [turn["content"] for turn in turns]
    found = {"image": [*map(pixels, images)], "history": data.chunks(before, 2), "question": question,
             "chosen": chosen, "rejected": rejected}
    return found | ({"system": system} if system else {})


def by_llama_factory(name):
    from datasets import Dataset
    from llamafactory.data.converter import align_dataset
    from llamafactory.data.mm_plugin import BasePlugin
    from llamafactory.data.parser import get_dataset_list
    columns = {key: key for key in ("chosen", "rejected", "images", "system")}
    about = {"file_name": name, "formatting": "sharegpt", "ranking": True,
             "columns": columns | {"messages": "conversations"}}
    attributes, = get_dataset_list(["pairs"], {"pairs": about})
    o = SimpleNamespace(media_dir=".", streaming=False, preprocessing_num_workers=None, overwrite_cache=True,
                        local_process_index=0)
    for read in align_dataset(Dataset.from_json(name, cache_dir="cache"), attributes, o, o):
        opened = BasePlugin(None, None, None)._regularize_images(
            read["_images"] or [], image_max_pixels=768 ** 2, image_min_pixels=32 ** 2)
        chosen, rejected = [turn["content"] for turn in read["_response"]]
        yield row(read["_system"], read["_prompt"], chosen, rejected, opened["images"])


def swift_dataset(name):
    from swift.dataset import load_dataset
    return load_dataset([name], strict=True, load_from_cache_file=False)[0]


def by_swift(name):
    from swift.template import Template
    from swift.template.template_inputs import TemplateInputs
    for read in swift_dataset(name):
        both = TemplateInputs.from_dict(read)
        *turns, chosen = both.chosen.messages
        *turns_rejected, rejected = both.rejected.messages
        assert (both.rejected.system, turns_rejected) == (both.chosen.system, turns)
        images, images_rejected = ([Template._load_image(image, True) for image in side.images]
                                   for side in (both.chosen, both.rejected))
        found = row(both.chosen.system, turns, chosen["content"], rejected["content"], images)
        if read.get("rejected_images"):
            found["image_rejected"] = [*map(pixels, images_rejected)]
        yield found


def by_trl(name):
    from trl import data_utils
    for read in data.read_jsonl(name):
        read |= data_utils.maybe_extract_prompt(read)
        turns = data_utils.prepare_multimodal_messages(read["prompt"], read["images"])
        images = [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        turns = [turn | {"content": "".join(part.get("text", "<image>") for part in turn["content"])}
                 for turn in turns]
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        chosen, rejected = (read[key][0]["content"] for key in ("chosen", "rejected"))
        yield row(system, turns, chosen, rejected, images)


# file: (the package that reads it, how, the pairs in it)
FILES = {"llama-factory.jsonl": ("llamafactory", by_llama_factory, PAIRS),
         "ms-swift-response.jsonl": ("swift", by_swift, PAIRS),
         "ms-swift-messages.jsonl": ("swift", by_swift, OTHERS),
         "trl.jsonl": ("trl", by_trl, PAIRS),
         "trl-implicit.jsonl": ("trl", by_trl, PAIRS)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files and their images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    for i in range(4):
        picture(i).save(f"{i}.png")
    for name in FILES:
        shutil.copy(DATA / name, ".")
    return tmp_path


def present(package):
    if not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed here: see {Path(__file__).name}")


@pytest.mark.parametrize("name", FILES)
def test_we_read_the_pairs_of_the_native_file(folder, name):
    *_, pairs = FILES[name]
    data.write_jsonl("native.jsonl", pairs)
    found, native = [pairs_of(Records(folder / path)) for path in (name, "native.jsonl")]
    for record in found + native:
        del record["id"]                                    # they name none: it is the file's name
        for key in ("images", "images_rejected"):
            record[key] = [*map(pixels, record[key])]
    assert found == native and len(found) == len(pairs)


@pytest.mark.parametrize("name", FILES)
def test_the_library_reads_the_pairs_of_the_native_file(folder, name):
    package, read, pairs = FILES[name]
    present(package)
    native = []
    for pair in pairs:
        images = {key: [*map(pixels, pair[key])] for key in ("image", "image_rejected") if key in pair}
        native.append(pair | images)
    assert list(read(name)) == native


@pytest.mark.parametrize("name", [name for name in FILES if "swift" in name])
def test_ms_swift_writes_the_file_that_is_here(folder, name):
    """As JSON lines; and its parquet, whose messages are of type JSON, reads alike."""
    present("swift")
    swift_dataset(name).to_json("again.jsonl", force_ascii=False)
    assert Path("again.jsonl").read_bytes() == (DATA / name).read_bytes()
    swift_dataset(name).to_parquet("again.parquet")
    lines, parquet = [pairs_of(Records(folder / f"again.{ending}")) for ending in ("jsonl", "parquet")]
    assert parquet == lines
