"""What users bring: each input is used rightly, or refused in one sentence with file, line and id.

Never silence, never a traceback, and --skip_bad drops what is refused. The inputs are written here; those of
../shared/cases/training are read too, where they are.
"""
import base64
import dataclasses
import io
import json
import re
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import SHARED, need, pairs_of, picture, write_llava
from PIL import Image
from test_train_dpo import run
from test_vlm import write_next

import data
import lora
import losses
import train_dpo
from data import UserError
from model import command, front, llava, vlm
from training import batches, checkpoint, options
from training.records import Records
from training.reference import Reference


def byte_tokenizer():
    """One token a byte, so that any text has tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>",
                                   bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """{name: folder} of a tiny LLaVA-1.5 and a tiny LLaVA-1.6, whose tokens an image depend on its shape."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = llava.TEMPLATES["plain"]
    return {"llava": write_llava(folder / "llava", byte_tokenizer()),
            "next": write_next(folder / "next", tokenizer=tokenizer)}


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


def pair(i=0, **changes):
    return {"id": f"p{i}", "image": f"{i % 4}.png", "question": "What is it?", "chosen": f"Two cups {i}.",
            "rejected": "A vase."} | changes


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def checked(model, path, **changes):
    """The pairs of a file, as train_dpo.py checks them; each of them is read once, as it does in a step."""
    o = options.Options(**{"model": str(model), "data": str(path), "loss": "dpo"} | changes)
    pairs = batches.checked(front.open_folder(model), o.data, o, options.needs_of(o), command.Ranks())
    for place in range(len(pairs)):
        pairs.read(place)
    return pairs


def refused(capsys, model, path, **changes):
    """What is said to stderr about faulty records, or the sentence that ends the run."""
    capsys.readouterr()
    with pytest.raises(UserError) as end:
        checked(model, path, **changes)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said or str(end.value)


# ---- a record is read completely: one faulty record among good ones ----
USER = {"from": "human", "value": "<image>\nWhat is it?"}
SURE = {"from": "human", "value": "Sure?"}
AND = {"from": "human", "value": "And <image>?"}


def gpt(text):
    return {"from": "gpt", "value": text}


def ask(*content):
    return [{"role": "user", "content": [*content, {"type": "text", "text": "What is it?"}]}]


def say(*texts):
    """A completion in TRL's layout: the assistant's turns, with the user's between them."""
    turns = [{"role": "assistant", "content": texts[0]}]
    for text in texts[1:]:
        turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": text}]
    return turns


TRL = {"images": ["0.png"], "prompt": ask({"type": "image"}), "chosen": say("A dog."),
       "rejected": say("A cat.")}
LLAVA = {"image": "0.png", "conversations": [USER, gpt("A dog.")],
         "rejected_conversations": [USER, gpt("A cat.")]}
FAULTY = {
    "two keys name the image": (pair(1, images=["1.png"]), "image and images each name an image"),
    "a path beside the image": (pair(1, image_path="2.png"), "image and image_path each name an image"),
    "img beside the image": (pair(1, img="2.png"), "image and img each name an image"),
    "two keys of rejected images": (pair(1, image_rejected="2.png", rejected_images=["3.png"]),
                                    "image_rejected and rejected_images each name an image"),
    "a video": (pair(1, videos=["a.mp4"]), "image and videos each name an image"),
    "more markers than images": (pair(1, question="Compare <image> and <image>."), "2 <image> for 1 images"),
    "fewer markers than images": (pair(1, question="<image>\nWhat?", image=["0.png", "1.png"]),
                                  "1 <image> for 2 images"),
    "a marker without an image": (pair(1, question="<image>\nWhat?", image=None), "1 <image> for 0 images"),
    "a marker in the answer": (pair(1, chosen="See <image> here"), "contains <image>"),
    "an image in a message": (TRL | {"images": None}, "1 <image> for 0 images"),
    "a completion of several turns": (TRL | {"chosen": say("A", "B"), "rejected": say("A", "C")},
                                      "not one turn after the same turns"),
    "the same last turn after other turns": (
        LLAVA | {"conversations": [USER, gpt("A"), SURE, gpt("Yes")],
                 "rejected_conversations": [USER, gpt("B"), SURE, gpt("Yes")]},
        "identical, though turns before may differ"),
    "an image that rejected's own turns leave out": (
        LLAVA | {"image": ["0.png", "1.png"], "conversations": [USER, gpt("A"), AND, gpt("Yes")],
                 "rejected_conversations": [USER, gpt("B"), SURE, gpt("No")]}, "1 <image> for 2 images"),
    "rejected's own turns in no order": (
        LLAVA | {"rejected_conversations": [USER, USER, gpt("No")]}, "the turns are not"),
    "another prompt than the record's": (
        TRL | {"rejected": [*say("A dog."), *ask(), *say("A cat.")]}, "not one turn after the same turns"),
    "messages that end with an answer to chosen and rejected": (
        TRL | {"messages": [*ask({"type": "image"}), *say("A dog.")], "prompt": None}, "the turns are not"),
    "a tool's turn": (TRL | {"prompt": [{"role": "tool", "content": "x"}, *TRL["prompt"]]},
                      "the turns are not"),
    "half a surrogate pair": (pair(1, chosen="Two cups \ud83d"), "surrogates not allowed"),
    "half of one in the question": (pair(1, question="\udc00?"), "surrogates not allowed"),
    "half of one in the system text": (pair(1, system="\udc00?"), "surrogates not allowed"),
    "half of one in the history": (pair(1, history=[["\udc00?", "Yes."]]), "surrogates not allowed"),
    "half of one in the image's path": (pair(1, image="\ud83d.png"), "surrogates not allowed"),
    "an unreadable rejected image": (pair(1, image_rejected="d.jsonl"), "d.jsonl is unreadable"),
    "an end-of-sequence token alone differs": (pair(1, chosen="A vase.</s>"), "are the same 8 tokens"),
    "a number for an image": (pair(1, image=[1, 2]), "the image is int, not a path"),
    "base64": (pair(1, image="iVBORw0K" * 200), "id p1"),
    "a data URI": (pair(1, image="data:image/png;base64," + "iVBORw0K" * 200), "id p1"),
    "base64 of a JPEG": (pair(1, image="/9j/4AAQ" * 200), "id p1"),
    "base64 as a hub's bytes": (pair(1, image={"bytes": "iVBORw0K" * 200, "path": None}), "id p1"),
    "a URL": (pair(1, image="https://example.com/a.png"), "is missing"),
    "a hub's image without bytes and path": (pair(1, image={"url": "a.png"}), "key 'bytes' is missing"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_what_cannot_be_used_is_refused_with_its_place_and_dropped_by_skip_bad(tiny, folder, capsys, name):
    row, words = FAULTY[name]
    good = pair(0)
    if "id" not in row:
        good = LLAVA if "conversations" in row else TRL
    path = lines(folder / "d.jsonl", [good, row])
    said = refused(capsys, tiny["llava"], path)
    assert said.startswith(f"{path}, line 2 (id {row.get('id', 'd:1')}): ") and words in said
    assert said.count("\n") == 1 and len(said) < len(str(path)) + 400
    pairs = checked(tiny["llava"], path, skip_bad=True)
    assert len(pairs) == 1 and "--skip_bad left out 1 of 2" in capsys.readouterr().err


# ---- what is used ----
USED = {
    "the plural key": pair(0, image=None, images=["0.png"], question="<image>\nWhat is it?"),
    "TRL": TRL,
    "TRL's implicit prompt": {"images": ["0.png"], "chosen": [*ask({"type": "image"}), *say("A dog.")],
                              "rejected": [*ask({"type": "image"}), *say("A cat.")]},
    "a prompt again in the completions": TRL | {"chosen": [*TRL["prompt"], *say("A dog.")]},
    "LLaMA-Factory": {"conversations": [USER], "chosen": gpt("A dog."), "rejected": gpt("A cat."),
                      "images": ["0.png"]},
    "LLaMA-Factory's openai tags": {"messages": ask({"type": "image"}), "chosen": say("A dog.")[0],
                                    "rejected": say("A cat.")[0], "images": ["0.png"]},
    "ms-swift": {"messages": [{"role": "user", "content": "<image>What is it?"}, *say("A dog.")],
                 "rejected_response": "A cat.", "images": ["0.png"]},
    "mDPO": {"img_path": "0.png", "prompt": "USER: <image>\nWhat is it? ASSISTANT:", "chosen": "A dog.",
             "rejected": "A cat."},
    "LLaVA": LLAVA,
    "RLAIF-V's image_path": pair(0, ds_name="RLAIF-V", image_path="elsewhere/0.png"),
}


@pytest.mark.parametrize("name", USED)
def test_every_layout_reads_as_the_same_pair(tiny, folder, name):
    pairs = checked(tiny["llava"], lines(folder / "d.jsonl", [USED[name]]))
    record = pairs.records[0]
    assert (record["question"], record["history"]) == ("What is it?", [])
    assert record["images"] == [str(folder / "0.png")]
    native = checked(tiny["llava"], lines(folder / "n.jsonl", [pair(0, chosen=record["chosen"],
                                                                    rejected=record["rejected"])]))
    same, = pairs.read(0).pairs
    assert same._replace(id="p0") == native.read(0).pairs[0]


# ---- two conversations, each with turns of its own ----
OWN = (["<image>\nWhat is it?", "A dog.", "And <image>?", "A cat."],
       ["<image> Or <image>?", "No.", "Sure?", "Yes."])


def turns(texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def llava_turns(texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


TWO = {"images": ["0.png", "1.png"], "rejected_images": ["2.png", "3.png"]}
APART = {"LLaVA": dict(zip(("conversations", "rejected_conversations"), map(llava_turns, OWN), strict=True)),
         "ms-swift": dict(zip(("messages", "rejected_messages"), map(turns, OWN), strict=True)),
         "TRL": dict(zip(("chosen", "rejected"), map(turns, OWN), strict=True))}


@pytest.mark.parametrize("name", APART)
def test_each_response_follows_its_own_turns(tiny, folder, name):
    """As if it were alone: with the images, the rejected ones, and where its own prompt has them."""
    pairs = checked(tiny["llava"], lines(folder / "d.jsonl", [APART[name] | TWO]), loss="symmpo")
    both, = pairs.read(0).pairs
    for field, (*history, question, response) in zip(("chosen", "rejected"), OWN, strict=True):
        row = pair(0, history=[history], question=question, image=TWO["images"], chosen=response,
                   image_rejected=TWO["rejected_images"])
        alone, = checked(tiny["llava"], lines(folder / "n.jsonl", [row]), loss="symmpo").read(0).pairs
        assert getattr(both, field) == alone.chosen
        for images in ("images", "rejected"):
            assert both.shown(images, field) == alone.shown(images)
    assert both.prompt != both.apart.prompt and pairs.tokens == [len(data.pack([both], pairs.needs).ids)]


def test_a_response_is_cut_behind_its_own_turns(tiny, folder):
    """Only where they are long; and turns that leave no room are a fault."""
    long, short = [["What is it?" * n, "A dog.", "Sure?", f"I see {n} of it."] for n in (9, 1)]
    row = {"messages": turns(short), "rejected_messages": turns(long), "images": ["0.png"]}
    path = lines(folder / "d.jsonl", [row])
    whole, = checked(tiny["llava"], path).read(0).pairs
    room = len(whole.apart.prompt) + 4
    cut, = checked(tiny["llava"], path, max_length=room).read(0).pairs
    assert (cut.chosen, cut.rejected) == (whole.chosen, whole.rejected[:4])
    with pytest.raises(UserError, match="1 of 1 records"):
        checked(tiny["llava"], path, max_length=room - 4)


def test_a_run_on_conversations_that_differ_earlier_looks_at_its_pictures(tiny, folder, tmp_path):
    """Both forwards, held-out pairs with other images, the KL: the command's numbers are the same."""
    rows = []
    for n in range(5):
        own = turns([OWN[n > 0][0].replace("<image>", ""), "No.", "Sure?", "Yes."])
        rows.append({"id": str(n), "images": [f"{n % 4}.png"], "rejected_messages": own,
                     "messages": turns([OWN[0][0], "No.", "Sure?", f"A cat {n}."])})
    path, found = lines(folder / "d.jsonl", rows), []
    for forward in ("packed", "naive"):
        out = tmp_path / forward
        words = ["--model", tiny["llava"], "--data", path, "--val_data", path, "--out", out, "--loss", "mdpo",
                 "--epochs", 1, "--batch", 2, "--lora_r", 4, "--forward", forward, "--set", "look=4",
                 "--set", "max_new_tokens=4", "--set", "warmup=0"]
        code, said = run(list(map(str, words)))
        assert code == 0, said
        found.append(json.loads((out / "summary.json").read_text()))
    packed, naive = found
    for side in ("before", "after"):
        assert packed[side]["margin"] == pytest.approx(naive[side]["margin"], abs=1e-3)
        for measure, mean in packed[side]["look"]["preference"].items():
            assert mean == pytest.approx(naive[side]["look"]["preference"][measure], abs=1e-3)
    assert packed["after"]["look"]["kl"][0] != 0


@pytest.mark.parametrize("meta", ["a text", ["a", "list"], {"theme": ["kitchen", 1]}, 7])
def test_meta_of_any_kind_is_kept_and_looked_at(tiny, folder, meta):
    from training import look
    records = Records(lines(folder / "d.jsonl", [pair(i, meta=meta) for i in range(3)]))
    shown = pairs_of(records)
    assert all(meta in (record["meta"], record["meta"].get("meta")) for record in shown)
    assert look.kinds_of(shown, [record["images"][0] for record in shown], 0)["other"].keys() == {0, 1, 2}


def test_mdpos_prompt_of_several_turns_is_history_and_question(folder):
    prompt = "USER: <image>\nWhat is it? ASSISTANT: Two cups.</s>USER: Where? ASSISTANT:"
    row = {"img_path": "0.png", "prompt": prompt, "chosen": "Left.", "rejected": "Right."}
    record = Records(lines(folder / "d.jsonl", [row]))[0]
    assert record["history"] == [["What is it?", "Two cups."]] and record["question"] == "Where?"


@pytest.mark.parametrize("image", ["", [], [""], None, {"bytes": None, "path": None}])
def test_an_image_of_nothing_is_no_image(tiny, folder, image):
    pairs = checked(tiny["llava"], lines(folder / "d.jsonl", [pair(0), pair(1, image=image)]))
    assert pairs.records[1]["images"] == [] and len(pairs) == 2


@pytest.mark.parametrize("model", ["llava", "next"])
def test_an_image_is_where_its_marker_is(tiny, folder, model):
    """In the question and in an earlier turn, with the text before and after it."""
    family = front.open_folder(tiny[model])
    row = pair(0, image=["0.png", "1.png"], question="Is it the one in <image>, too?",
               history=[["Look at <image> here.", "I do."]])
    batch = checked(tiny[model], lines(folder / "d.jsonl", [row])).read(0)
    ids = batch.pairs[0].prompt
    parts, token = [[]], family.image_token_id
    for n, id in enumerate(ids):
        if id == token and ids[n - 1] != token:
            parts.append([])
        if id != token:
            parts[-1].append(id)
    before, between, after = map(family.tokenizer.decode, parts)
    assert before.endswith("Look at ") and between.startswith(" here.") and between.endswith("in ")
    assert "I do." in between and after.startswith(", too?")
    assert len(vlm.encode_images(vlm.load(family), batch).images) == 2      # features are as many as places


def test_markers_in_front_and_none_at_all_give_the_same_prompt(tiny, folder):
    questions = ("What?", "<image>What?", "<image>\nWhat?")
    path = lines(folder / "d.jsonl", [pair(i, question=text) for i, text in enumerate(questions)])
    pairs = checked(tiny["llava"], path)
    first, *others = [pairs.read(place).pairs[0].prompt for place in range(3)]
    assert others == [first, first]


def test_sft_needs_no_rejected_response_and_other_losses_do(tiny, folder, capsys):
    row = pair(0)
    del row["rejected"]
    path = lines(folder / "d.jsonl", [row, pair(1, rejected="")])
    assert len(checked(tiny["llava"], path, loss="sft")) == 2
    assert "line 1 (id p0): key 'rejected' is missing" in refused(capsys, tiny["llava"], path)


def test_records_without_any_image_are_refused_where_the_loss_compares_images(tiny, folder, capsys):
    path = lines(folder / "d.jsonl", [pair(0, image=""), pair(1, image=None)])
    assert "line 2 (id p1): there is no image" in refused(capsys, tiny["llava"], path, loss="mdpo")
    assert len(checked(tiny["llava"], path)) == 2


def mixed(model, folder, **changes):
    """(Run of a tuned model in float64, a batch of pairs with and without an image)."""
    rows = [pair(0), pair(1, image=""), pair(2, image_rejected="3.png"), pair(3, image=None)]
    del rows[3]["image"]
    pairs = checked(model, lines(folder / "d.jsonl", rows), loss="mdpo", **changes)
    m = vlm.load(pairs.front, dtype=torch.float64)
    lora.add_lora(m.model, 4, 8, [""], 0)
    torch.manual_seed(0)
    for name, weight in m.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    run = types.SimpleNamespace(model=m, o=pairs.o, loss=options.loss_of(pairs.o), pairs=pairs)
    return run, batches.join([pairs.read(place) for place in range(4)])


def gradients_of(run, loss):
    loss.sum().backward()
    found = {name: p.grad.clone() for name, p in run.model.model.named_parameters() if p.grad is not None}
    run.model.model.zero_grad()
    return found


@pytest.mark.parametrize("change", [{}, {"image_rejected": "random", "anchors": "wlm"},
                                    {"crop_pixels": True}])
def test_pairs_without_an_image_are_trained_on_but_for_what_compares_images(tiny, folder, capsys, change):
    """Their DPO and AncPO count, CoPO is 0 with its gradient; naive equals packed; the log's numbers are of
    those that have one."""
    run, batch = mixed(tiny["llava"], folder, **change)
    assert run.pairs.without_image == 2 and "2 of 4 pairs have no image" in capsys.readouterr().out
    found, gradients = {}, {}
    for name, forward in vlm.FORWARDS.items():
        frozen = Reference(4, run.model, forward, run.pairs.needs, command.Ranks())
        loss, policy, reference = train_dpo.step_loss(run, batch, frozen)
        gradients[name], found[name] = gradients_of(run, loss), loss.detach()
        parts = losses.resolve("dpo+ancpo", anchors=change.get("anchors", "w").replace("m", ""))
        rest = parts(policy, reference, run.o.beta, 0.0)
        assert (loss - rest)[[1, 3]].eq(0).all() and (loss - rest)[[0, 2]].gt(0.1).all()
    torch.testing.assert_close(found["naive"], found["packed"], rtol=0, atol=1e-9)
    torch.testing.assert_close(gradients["naive"], gradients["packed"], rtol=1e-4, atol=1e-6)  # float32 norms
    logged = train_dpo.means(train_dpo.fetched([train_dpo.measures(policy, reference, loss, run.o.beta)]))
    chosen, _, image = losses.rewards(policy, reference, run.o.beta)
    assert logged["rewards/image_margins"] == pytest.approx((chosen - image)[[0, 2]].mean().item())
    assert logged["rewards/image_accuracies"] == (chosen > image)[[0, 2]].double().mean()
    assert all(map(np.isfinite, logged.values()))


def test_the_gradient_of_a_pair_without_an_image_is_that_of_dpo_and_ancpo(tiny, folder):
    run, batch = mixed(tiny["llava"], folder)
    gradients = []
    for loss in (run.loss, losses.resolve("dpo+ancpo")):
        run.loss = loss
        frozen = Reference(4, run.model, vlm.packed, run.pairs.needs, command.Ranks())
        value, _, _ = train_dpo.step_loss(run, batch, frozen)
        gradients.append(gradients_of(run, value[[1, 3]]))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


# ---- files ----
def zipped(text):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("d.jsonl", text)
    return out.getvalue()


@pytest.mark.parametrize("spoil, word", [
    (zipped, "zip"), (lambda text: text.encode("utf-16"), "UTF-16"),
    (lambda text: text.encode("utf-16-be"), "UTF-16"),
    (lambda text: b"question,chosen,rejected,image\na,b,c,0.png\n", "csv")])
def test_a_file_of_another_kind_is_named(tiny, folder, capsys, spoil, word):
    path = folder / "d.jsonl"
    path.write_bytes(spoil(json.dumps(pair()) + "\n"))
    said = refused(capsys, tiny["llava"], path)
    assert word in said and str(path) in said and "\n" not in said


def test_parquet_is_read_by_row_groups(folder, monkeypatch):
    """Opening reads none; a record reads its own group, of which a few are kept."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [pair(i, image=None, images=[{"bytes": (folder / f"{i % 4}.png").read_bytes(), "path": None}])
            for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=5)
    read, iter_batches = [], pq.ParquetFile.iter_batches

    def counted(self, size, groups):
        read.append(groups)
        return iter_batches(self, size, groups)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    records = Records(folder / "d.parquet")
    assert len(records) == 40 and read == [[0]]              # of the first record, whose keys tell the format
    assert records[37]["id"] == "p37" and read == [[0], [7]]
    assert records[37]["images"] == [(folder / "1.png").read_bytes()]


# ---- images ----
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tiff", "webp"])
def test_an_orientation_is_applied_once_to_size_and_pixels(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    grey.paste((255, 255, 255), (0, 0, 20, 15))              # the corner that moves
    grey.save(tmp_path / f"a.{kind}", exif=exif)
    image = data.read_image(tmp_path / f"a.{kind}")
    assert image.size == data.image_size(tmp_path / f"a.{kind}") == ((40, 30), (30, 40))[orientation > 4]
    corners = [image.getpixel((x, y))[0] > 128 for y in (4, image.height - 5) for x in (4, image.width - 5)]
    assert corners.index(True) == [0, 1, 3, 2, 0, 1, 3, 2][orientation - 1] and sum(corners) == 1


def test_a_turned_tiff_has_as_many_features_as_places(tiny, folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (160, 40)).save(folder / "wide.tiff", exif=exif)
    pairs = checked(tiny["next"], lines(folder / "d.jsonl", [pair(0, image="wide.tiff"), pair(1)]))
    m = vlm.load(pairs.front)
    vlm.encode_images(m, batches.join([pairs.read(0), pairs.read(1)]))       # an error if they differ


@pytest.mark.parametrize("which", ["places for images, the vision tower gives 4", "p1: its prompt has 3"])
def test_fewer_places_than_features_are_an_error_that_names_the_pair(tiny, folder, which):
    """In either image, before both forwards: a prompt that lacks a place, as another size would make it."""
    pairs = checked(tiny["llava"], lines(folder / "d.jsonl", [pair(0), pair(1)]), loss="mdpo")
    batch = batches.join([pairs.read(0), pairs.read(1)])
    token = pairs.front.image_token_id
    for name in ("prompt", "prompt_rejected"):
        ids = list(getattr(batch.pairs[1], name))
        ids.remove(token)
        wrong = batch._replace(pairs=[batch.pairs[0], batch.pairs[1]._replace(**{name: ids})])
        with pytest.raises(UserError, match=which):
            vlm.encode_images(vlm.load(pairs.front), wrong)


@pytest.mark.parametrize("change, says", [
    ({"image": "none.png"}, "is missing"), ({"rejected": "Two cups 1."}, "are identical"),
    ({"chosen": "</s>"}, "has no token"), ({"question": "How? " * 99}, "leaves no room"),
    ({"chosen": "So long. " * 99, "rejected": "So long. " * 98}, "the same")])
def test_faulty_validation_pairs_are_found_before_loading(tiny, folder, capsys, monkeypatch, change, says):
    class Loads(Exception):
        pass

    def load(*_):
        raise Loads
    monkeypatch.setattr(train_dpo, "load", load)
    good = lines(folder / "d.jsonl", [pair(0)])
    held_out = lines(folder / "v.jsonl", [pair(0), pair(1, **change)])
    o = options.Options(model=str(tiny["llava"]), data=str(good), val_data=str(held_out), loss="sft",
                        max_length=300)
    ranks = command.Ranks(device=torch.device("cpu"))
    with pytest.raises(UserError, match="faulty"):
        train_dpo.prepare(o, folder / "run", ranks)
    said = capsys.readouterr().err
    assert f"{held_out}, line 2 (id p1): " in said and says in said
    with pytest.raises(Loads):
        train_dpo.prepare(dataclasses.replace(o, skip_bad=True), folder / "run", ranks)
    assert f"--skip_bad left out 1 of 2 records of {held_out}" in capsys.readouterr().err


@pytest.mark.parametrize("top", [1, 255, 4000])
def test_a_float_image_is_scaled(tmp_path, top):
    """From 0 to 1, to 255 or beyond."""
    ramp = np.linspace(0, top, 1200, dtype=np.float32).reshape(30, 40)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    found = np.asarray(data.read_image(tmp_path / "a.tiff"))[..., 0].astype(float)
    assert np.abs(found - ramp / top * 255).max() <= 1


def test_a_link_out_of_the_image_root_is_refused_with_what_helps(tiny, folder, tmp_path_factory, capsys):
    disk = tmp_path_factory.mktemp("disk")
    picture(9).save(disk / "a.png")
    (folder / "coco").symlink_to(disk)
    path = lines(folder / "d.jsonl", [pair(0, image="coco/a.png")])
    assert "move it inside (a copy, not a link)" in refused(capsys, tiny["llava"], path)


def test_no_message_is_longer_than_what_it_names():
    text = base64.b64encode(bytes(3000)).decode()
    assert len(str(UserError(f"image {text} is unreadable: {text}"))) < 250
    assert str(UserError("a " * 400)) == "a " * 400


# ---- rejected images ----
def test_random_never_draws_the_same_picture_under_any_name(tiny, folder):
    """The same file, a copy of it, and the same pixels in another format are one picture."""
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    Image.open(folder / "0.png").save(folder / "again.bmp")
    names = ["0.png", "copy.png", "again.bmp", "1.png", "0.png", "1.png", "copy.png", "0.png"]
    path = lines(folder / "d.jsonl", [pair(i, image=name) for i, name in enumerate(names)])
    pairs = checked(tiny["llava"], path, loss="copo", image_rejected="random")
    for place in range(len(pairs)):
        batch = pairs.read(place)
        own, = batch.images
        drawn, = batch.images_rejected
        assert (own["pixel_values"] != drawn["pixel_values"]).any(), names[place]


@pytest.mark.parametrize("n", [1, 3])
def test_random_without_another_picture_is_refused(tiny, folder, n):
    path = lines(folder / "d.jsonl", [pair(i, image="0.png") for i in range(n)])
    with pytest.raises(UserError, match="all pictures are the same one"):
        checked(tiny["llava"], path, loss="copo", image_rejected="random")


def test_a_rare_other_picture_is_found_and_that_there_is_none_costs_one_look_at_each(folder, monkeypatch):
    """Among hundreds of the same picture; no record is read again and again."""
    rows = [pair(i, image="0.png") for i in range(250)]
    read, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path) or read_image(path))
    with pytest.raises(UserError, match="all pictures are the same one"):
        batches.other_image(Records(lines(folder / "d.jsonl", rows)), 0, "p0", 0, picture(0))
    assert len(read) == 100 + 250
    rows[200:202] = pair(200, image="1.png"), pair(201, image="2.png")
    records = Records(lines(folder / "d.jsonl", rows))
    drawn = [batches.other_image(records, 0, f"p{i}", i, picture(0)).tobytes() for i in range(4)]
    assert {*drawn} == {picture(1).tobytes(), picture(2).tobytes()} and len(read) < 2 * 350 + 4 * 101
    assert drawn == [batches.other_image(records, 0, f"p{i}", i, picture(0)).tobytes() for i in range(4)]


def test_draws_that_differ_stay_as_they_were(folder):
    path = lines(folder / "d.jsonl", [pair(i) for i in range(4)])
    records = Records(path)
    for i in range(4):
        index = batches.other_index(0, f"p{i}", i, 4)
        drawn = batches.other_image(records, 0, f"p{i}", i, picture(i))
        assert drawn.tobytes() == picture(index).tobytes()


@pytest.mark.parametrize("own", [True, False])
def test_a_rejected_image_that_leaves_no_room_is_found_before_training(tiny, folder, capsys, own):
    """In LLaVA-1.6 a larger one has more tokens, whether it is the record's own or drawn."""
    picture(8, (28, 28)).save(folder / "small.png")
    picture(9, (84, 84)).save(folder / "big.png")
    picture(7, (28, 28)).save(folder / "other.png")
    rows = [pair(i, image=("small.png", "other.png")[i % 2]) for i in range(8)]
    if own:
        rows[5]["image_rejected"] = "big.png"
    else:
        rows[7]["image"] = "big.png"
    path = lines(folder / "d.jsonl", rows)
    kind = {"loss": "mdpo", "image_rejected": "crop" if own else "random"}
    fits = checked(tiny["next"], path, **kind)
    prompts = [len(max(fits.read(place).pairs[0][1:3], key=len)) for place in range(8)]
    longest = max(prompts)
    assert longest > min(prompts)
    rows = [data.pack(fits.read(place).pairs, fits.needs) for place in range(8)]   # the plan counts both
    assert fits.tokens == [len(row.ids) for row in rows]
    said = refused(capsys, tiny["next"], path, **kind, max_length=longest)
    assert said.count("leaves no room") == prompts.count(longest)
    kept = checked(tiny["next"], path, **kind, max_length=longest, skip_bad=True)
    assert len(kept) == 8 - prompts.count(longest)


# ---- what a run is ----
def test_responses_that_become_equal_are_refused(tiny, folder, capsys):
    text = "The table is long. " * 9
    rows = [pair(0), pair(1, chosen=text + "Two cups.", rejected=text + "A vase.")]
    path = lines(folder / "d.jsonl", rows)
    assert "line 2 (id p1): chosen and rejected are the same" in refused(capsys, tiny["llava"], path,
                                                                         max_length=300)
    assert len(checked(tiny["llava"], path, max_length=300, skip_bad=True)) == 1


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("name", ["data", "val_data"])
def test_a_run_of_pairs_that_have_changed_is_refused(tmp_path, name, skip_bad):
    """A finished or stopped run names its pairs by content in its log's first line."""
    files = {key: str(lines(tmp_path / f"{key}.jsonl", [pair(0)])) for key in ("data", "val_data")}
    o = options.Options(**files, model=str(tmp_path), skip_bad=skip_bad)
    out = tmp_path / "run"
    out.mkdir()
    first = {"options": dataclasses.asdict(o), **options.provenance(o)}
    data.append_jsonl(out / "log.jsonl", first)
    options.claim(out, o).close()
    lines(tmp_path / f"{name}.jsonl", [pair(1)])
    with pytest.raises(UserError, match=f"{name}.jsonl has changed since"):
        options.claim(out, o)


@pytest.mark.parametrize("name", ["data", "val_data"])
@pytest.mark.parametrize("change", ["other pixels of the same size", "gone", "rejected"])
def test_a_run_whose_images_have_changed_is_refused(tmp_path, name, change):
    """The file of an image, or of a rejected one, is another, or there is none any more."""
    files = {}
    for k, key in enumerate(("data", "val_data")):
        rows = [pair(k, image=f"{key}.bmp", image_rejected=f"{key}-rejected.bmp"), pair(8, image="no.png")]
        files[key] = str(lines(tmp_path / f"{key}.jsonl", rows))
        for seed, image in enumerate((f"{key}.bmp", f"{key}-rejected.bmp")):
            picture(seed).save(tmp_path / image)
    o = options.Options(**files, model=str(tmp_path))
    out = tmp_path / "run"
    out.mkdir()
    data.append_jsonl(out / "log.jsonl", {"options": dataclasses.asdict(o), **options.provenance(o)})
    options.claim(out, o).close()
    image = tmp_path / (f"{name}-rejected.bmp" if change == "rejected" else f"{name}.bmp")
    picture(9).save(image)
    if change == "gone":
        image.unlink()
    with pytest.raises(UserError, match=f"an image of {tmp_path}/{name}.jsonl has changed since"):
        options.claim(out, o)


@pytest.mark.parametrize("words", [["--data", "pairs.jsonl"], ["--data", "a", "--loss", "dpo"]])
def test_data_of_ones_own_needs_a_model(words):
    with pytest.raises(UserError, match="needs --model"):
        options.parse(words, "")
    assert options.parse([*words, "--model", "classroom"], "").model == "classroom"


def test_a_checkpoint_of_another_version_is_a_sentence(tmp_path):
    import torch
    from safetensors.torch import save
    about = {"state": json.dumps({"step": 3, "moon": "full"}), "base": "b"}
    tensors = {"reference/logps": torch.zeros(1), "reference/key": torch.zeros(1)}
    data.atomic_write(tmp_path / checkpoint.FILE, save(tensors, about))
    from types import SimpleNamespace
    optimiser = SimpleNamespace(load=lambda tensors: None)
    run = SimpleNamespace(out=tmp_path, base="b", reference=SimpleNamespace(), optimiser=optimiser)
    with pytest.raises(UserError, match="is damaged, or of another version"):
        checkpoint.restore(run)


@pytest.mark.parametrize("setting", [{"alora_invocation_tokens": [1, 2]}, {"arrow_config": {"top_k": 2}}])
def test_an_adapter_that_does_more_than_lora_is_refused_by_name(tmp_path, setting):
    import safetensors.torch
    import torch
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | setting))
    with pytest.raises(UserError, match=next(iter(setting))):
        lora.read_adapter(tmp_path)


# ---- the command itself ----
def test_the_command_ends_with_one_sentence_and_no_traceback(tiny, folder):
    path = lines(folder / "d.jsonl", [pair(0), pair(1, question="<image> and <image>")])
    words = ["--model", tiny["llava"], "--data", path, "--loss", "dpo", "--out", folder / "run"]
    code, said = run(list(map(str, words)))
    assert code == 1 and "Traceback" not in said
    assert f"{path}, line 2 (id p1): 2 <image> for 1 images" in said
    assert not (folder / "run" / "adapter").exists()


# ---- the shared cases: number of pairs that are used, or what is said ----
CASES = SHARED / "cases" / "training"
FOUND = {
    "changed-data/pairs.jsonl": 8,
    "cut-to-identical/eos.jsonl": "the same",
    "cut-to-identical/pairs.jsonl": "the same",
    "empty-image-string/pairs.jsonl": 4,
    "file-encodings/array_bom.json": 4,
    "file-encodings/bom_crlf.jsonl": 4,
    "file-encodings/csv.csv": "csv",
    "file-encodings/dict_data.json": "no known format has the keys data",
    "file-encodings/dict_one.json": "line 1: broken JSON",
    "file-encodings/gz.jsonl.gz": 4,
    "file-encodings/latin1.jsonl": "line 1: broken JSON",
    "file-encodings/nan.jsonl": 4,
    "file-encodings/utf16.jsonl": "UTF-16",
    "file-encodings/z.zip": "zip",
    "image-as-text/b64.jsonl": 1,
    "image-as-text/datauri.jsonl": 1,
    "image-as-text/emptylist.jsonl": 1,
    "image-as-text/hfdict_b64.jsonl": 1,
    "image-as-text/hfdict_null.jsonl": 1,
    "image-as-text/int.jsonl": "the image is int",
    "image-as-text/list_empty_str.jsonl": 1,
    "image-as-text/none_str.jsonl": "image None is missing",
    "image-as-text/url.jsonl": "a.png is missing",
    "interleaved-images/pairs.jsonl": 4,
    "llamafactory-sharegpt/pairs.jsonl": 4,
    "lone-surrogate/pairs.jsonl": "line 3 (id s2)",
    "marker-count-mismatch/pairs.jsonl": "2 <image> for 1 images",
    "mdpo-multiturn-prompt/pairs.jsonl": 2,
    "ms-swift/pairs.jsonl": 4,
    "odd-image-files/pairs.jsonl": 30,
    "parquet-hf/plural.parquet": 4,
    "parquet-hf/trl.parquet": 4,
    "plural-images-key/pairs.jsonl": 4,
    "povid-multiturn/pairs.jsonl": "identical, though turns before may differ",
    "random-longer-image/later.jsonl": "leaves no room",
    "random-longer-image/own.jsonl": "leaves no room",
    "random-longer-image/pairs.jsonl": "leaves no room",
    "random-same-image/pairs.jsonl": 8,
    "several-rejected/ids.jsonl": "line 3 (id 7): the id is a duplicate",
    "several-rejected/marker.jsonl": "line 2 (id p1)",
    "several-rejected/mixed.jsonl": 2,
    "several-rejected/pairs.jsonl": 2,
    "several-rejected/sft.jsonl": 2,
    "several-rejected/sys.jsonl": 1,
    "several-rejected/tool.jsonl": "the turns are not",
    "several-rejected/trl.jsonl": 2,
    "symlinked-images/pairs.jsonl": 2,
    "tiff-orientation/pairs.jsonl": 2,
    "tiff-orientation/std.jsonl": 2,
    "trl-implicit-prompt/pairs.jsonl": 4,
    "trl-multiturn-completion/pairs.jsonl": "not one turn after the same turns",
}
WITH = {"cut-to-identical": {"max_length": 300}, "several-rejected/sft": {"loss": "sft"},
        "random-same-image": {"loss": "copo", "image_rejected": "random"},
        # as long as the longest prompt
        "random-longer-image": {"loss": "mdpo", "image_rejected": "random", "max_length": 63},
        "several-rejected/mixed": {"loss": "mdpo"}}
NEXT = ("odd-image-files", "random-longer-image", "tiff-orientation")
GOOD = {                               # the lines that --skip_bad leaves of a faulty file; of the others none
    "file-encodings/latin1.jsonl": {2, 3, 4},
    "lone-surrogate/pairs.jsonl": {1, 2, 4},
    "random-longer-image/later.jsonl": {40},
    "random-longer-image/pairs.jsonl": {8},
    "several-rejected/ids.jsonl": {1, 2, 4},
    "several-rejected/marker.jsonl": {1},
}


def shared_case(tiny, name):
    """(its file, the model for it, its options)."""
    path, folder = need(CASES / name), name.partition("/")[0]
    changes = WITH.get(folder) or WITH.get(name.partition(".")[0]) or {}
    return path, tiny["next" if folder in NEXT else "llava"], {"loss": "dpo"} | changes


def test_every_shared_case_is_here():
    files = {str(path.relative_to(CASES)) for path in need(CASES).glob("*/*") if path.is_file()}
    assert files - {f"{folder.name}/README" for folder in CASES.iterdir()} == FOUND.keys()


@pytest.mark.parametrize("name", FOUND)
def test_shared_case(tiny, capsys, name):
    path, model, changes = shared_case(tiny, name)
    if isinstance(FOUND[name], int):
        assert len(checked(model, path, **changes)) == FOUND[name]
    else:
        said = refused(capsys, model, path, **changes)
        assert FOUND[name] in said and str(path) in said


@pytest.mark.parametrize("name", [name for name in FOUND if isinstance(FOUND[name], str)])
def test_shared_case_with_skip_bad(tiny, tmp_path, name):
    """The command trains on the good records and says what it left out, or ends with one sentence."""
    path, model, changes = shared_case(tiny, name)
    words = ["--model", model, "--data", path, "--out", tmp_path / "run", "--skip_bad", "--epochs", 1,
             "--lora_r", 4, "--set", "look=0"]
    for key, value in changes.items():
        words += ["--set", f"{key}={value}"] if key == "max_length" else [f"--{key}", value]
    code, said = run(list(map(str, words)))
    assert "Traceback" not in said
    if name in GOOD:
        lines = {int(n) for n in re.findall(rf"^{re.escape(str(path))}, line (\d+)", said, re.MULTILINE)}
        more = sum(map(int, re.findall(r"and (\d+) more", said)))        # faults without a line
        assert f"--skip_bad left out {len(lines) + more} of {len(lines | GOOD[name]) + more} records" in said
        assert (code, lines & GOOD[name]) == (0, set())
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["pairs"] == len(GOOD[name])
    else:
        *_, last = said.splitlines()
        assert code == 1 and last.startswith("train_dpo.py: ") and str(path) in last
