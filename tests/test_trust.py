"""What a user's folders, files and options may hold: refused in a sentence, never run and never followed."""
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import fuzz_inputs
import numpy as np
import pytest
import test_chat
from conftest import ROOT, SHARED, picture, write_llava
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import synth
from model import command, front, vlm
from training import checkpoint, options, report

STRESS = SHARED / "cases" / "stress"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("model") / "llava"
    write_llava(found, hidden=16)
    return found


# ---- model folders ----
@pytest.mark.parametrize("kind, says", [
    ("jinja-loop", "it computes for seconds"), ("jinja-big", "MemoryError"),
    ("jinja-div", "division or modulo by zero"), ("jinja-undef", "'foo' is undefined")])
def test_a_chat_template_that_fails_or_takes_too_much_is_named_within_seconds(kind, says):
    if not STRESS.exists():
        pytest.skip("the cases of ../shared are not there")
    with pytest.raises(data.UserError, match=says) as caught:
        front.open_folder(STRESS / kind)
    assert kind in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_is_bounded_in_what_it_writes():
    plain = SimpleNamespace(special_tokens_map={"bos_token": "<s>"})
    front.check_template("here", plain, "{{ bos_token }}{{ messages | tojson }}", [])
    with pytest.raises(data.UserError, match=r"template of here .*it writes 200,000 characters"):
        front.check_template("here", plain, "{{ 'xy' * 100000 }}", [])


@pytest.mark.parametrize("constant", ["'x' * 999999999", "'x' | center(999999999)", "[0] * 999999999"])
def test_a_constant_of_a_branch_that_is_not_taken_counts_too(constant):
    """Jinja makes it where it compiles, and goes on in silence if that fails for want of memory."""
    plain = SimpleNamespace(special_tokens_map={})
    template = f"A{{% if not messages %}}{{{{ {constant} }}}}{{% endif %}}"
    says = "MemoryError, for a constant" if sys.platform == "linux" else "it computes for seconds"
    with pytest.raises(data.UserError, match=f"template of here .*{says}"):
        front.check_template("here", plain, template, [{}])


def test_no_code_of_a_model_folder_runs_and_nobody_is_asked(folder, tmp_path, monkeypatch, capsys):
    """auto_map for config, model, tokenizer and image processor; standard input is not touched."""
    shutil.copytree(folder, tmp_path / "own")
    fuzz_inputs.bring_code(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", None)
    assert vlm.load(tmp_path / "own").model.config.model_type == "llava"
    assert os.listdir(tmp_path) == ["own"] and "trust" not in "".join(capsys.readouterr())


def test_every_loading_call_refuses_code():
    """One call loads models, tokenizers, processors and pipelines: see test_house.py."""
    source = (ROOT / "data.py").read_text()
    assert "kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)" in source


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "nan")
    file = tmp_path / "nan" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight"))
    weights[name][0, 0] = float("inf")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(data.UserError, match=r"layers.1.self_attn.q_proj.weight is not finite"):
        vlm.load(tmp_path / "nan")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_is_read_nowhere(folder, tmp_path, make):
    make(tmp_path / "odd.json")
    for read in (data.read_json, data.read_bytes, data.read_records, command.read_text, command.digest):
        with pytest.raises(data.UserError, match="odd.json could not be read .it is a pipe or a device"):
            read(tmp_path / "odd.json")
    with pytest.raises(data.UserError, match="holds a pipe or a device: copy it"):
        data.from_folder(None, tmp_path, "model", "copy it")
    with pytest.raises(data.UserError, match="odd.json is missing"):
        data.read_image(tmp_path / "odd.json")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero", "/", "."])
def test_no_device_and_no_folder_is_replaced_by_a_file(name):
    """As root a rename would do it."""
    with pytest.raises(data.UserError, match="give another name"):
        data.atomic_write(name, "")
    assert os.path.exists(name) and not os.path.isfile(name)


# ---- pictures ----
@pytest.mark.parametrize("size", [(13_000, 13_000), (10_001, 200), (8193, 8192)])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, size):
    picture(0, (9, 9)).save(tmp_path / "huge.png")
    content = (tmp_path / "huge.png").read_bytes()
    head = b"IHDR" + struct.pack(">IIBBBBB", *size, 16, 0, 0, 0, 0)
    head += struct.pack(">I", zlib.crc32(head))
    (tmp_path / "huge.png").write_bytes(content[:12] + head + content[33:])
    for read in (data.read_image, data.image_size):
        with pytest.raises(data.UserError, match=rf"huge.png .*{size[0]} x {size[1]} pixels are over 67,"):
            read(tmp_path / "huge.png")


@pytest.mark.parametrize("mode, values", [("I;16", [0, 255, 256, 511, 65535]), ("I", [-5, 0, 256, 70000]),
                                          ("F", [0, 0.5, 100.25, 300])])
def test_wide_grey_pictures_become_eight_bits_as_before(tmp_path, mode, values):
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    Image.fromarray(np.array([values], kinds[mode])).save(tmp_path / "wide.tiff")
    pixels = np.array(values, float)
    unit = 256 if mode[0] == "I" else max(1, pixels.max()) / 255
    found = np.asarray(data.read_image(tmp_path / "wide.tiff"))[0, :, 0]
    assert found.tolist() == (pixels / unit).clip(0, 255).astype(np.uint8).tolist()


# ---- options ----
TRAIN = [["--epochs", "1e30"], ["--epochs", "9" * 30], ["--set", "warmup=5"], ["--set", "adam_beta1=1.5"],
         ["--set", "adam_beta2=nan"], ["--seed", "-1"], ["--lr", "inf"], ["--lr", "nan"], ["--beta", "-0.1"],
         ["--dtype", "banana"], ["--set", "device=banana"], ["--set", "clip=nan"], ["--out", "a\0b"],
         ["--out", "\ud800"], ["--delta", "1e30"], ["--set", "template=\0"], ["--batch", "0.5"]]
SYNTH = [["--guidance", "nan"], ["--guidance", "5,inf"], ["--guidance", "1e30"], ["--seed", "-1"],
         ["--size", "99999999"], ["--set", "dtype=banana"], ["--set", "similar=2"], ["--set", "chunk=0"],
         ["--set", "topics=\0"], ["--per_topic", "-3"], ["--threshold", "nan"]]


@pytest.mark.parametrize("argv", TRAIN, ids=lambda argv: repr(" ".join(argv)[:30]))
def test_options_of_training_are_finite_in_range_and_of_their_type(argv):
    with pytest.raises((data.UserError, SystemExit)) as caught:
        options.parse(argv, "")
    assert re.search("must|not a|one of|holds a NUL|give|there is no", str(caught.value))


@pytest.mark.parametrize("argv", SYNTH, ids=lambda argv: repr(" ".join(argv)[:30]))
def test_options_of_synthesis_are_finite_in_range_and_of_their_type(argv):
    with pytest.raises((data.UserError, SystemExit)) as caught:
        synth.options(argv)
    assert re.search("must|not a|one of|holds a NUL|give|there is no", str(caught.value))


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "cpu:-3"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(data.UserError, match=f"--device {device}: .*give cuda, mps or cpu"):
        command.place(device)


def test_an_id_is_a_name_in_its_folder_and_leads_nowhere():
    for text in ("../../etc", "/etc/passwd", "a/b", "a\0b", "x" * 5000, "..", "ä b"):
        name = command.file_name(text)
        assert "/" not in name and "\0" not in name and len(name) <= 100
    run = synth.Run(SimpleNamespace(), ROOT / "out")
    for name in ("../../escape", "scores-../../x", "/etc/x"):
        assert run.path(name, "parts").resolve().parent == (ROOT / "out" / "parts").resolve()


@pytest.mark.parametrize("value, shape, right", [
    (1, int, True), (True, int, False), (1.0, int, False), (1, float, True), (float("nan"), float, False),
    (10 ** 400, float, False), ("a", str, True), ("\ud800", str, False), (None, (None, str), True),
    ([1, 2], [int], True), ([1, "2"], [int], False), ([1, 2], [int, int], True), ([1], [int, int], False),
    ({"a": 1}, {"a": int}, True), ({}, {"a": int}, False), ({"x": [1.5]}, {str: [float]}, True),
    ({"x": 1}, {str: [float]}, False), ([], {"a": int}, False), ("ab", [str], False)])
def test_a_field_has_the_shape_that_is_asked_of_it(value, shape, right):
    assert command.fits(value, shape) == right


def test_a_field_of_the_wrong_type_is_named_with_file_and_line(tmp_path):
    run = synth.Run(SimpleNamespace(), tmp_path)
    rows = [{"id": "a", "question": "what ?"}, {"id": ["b"], "question": "what ?"}]
    data.write_jsonl(tmp_path / "instructions.jsonl", rows)
    with pytest.raises(data.UserError, match=r"ions.jsonl, line 2 has .* as 'id', so this is no file"):
        run.rows("instructions")


# ---- the state of a run ----
def test_restart_keeps_what_was_there_under_another_name(tmp_path):
    out = tmp_path / "run"
    for number in (1, 2):
        out.mkdir()
        (out / "log.jsonl").write_text(json.dumps({"options": {"seed": 9, "loss": str(number)}}) + "\n")
        with pytest.raises(data.UserError, match="holds a run of other options .*or --restart"):
            options.claim(out, options.Options(out=str(out))).close()
        lock = options.claim(out, options.Options(out=str(out), restart=True))
        assert os.listdir(out) == [".lock"]
        assert f'"loss": "{number}"' in (tmp_path / f"run.{number}" / "log.jsonl").read_text()
        lock.close()
        (out / ".lock").unlink()
        out.rmdir()
    assert "restart" not in options.decisive(options.Options())


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b'{"pairs": 1', b"[]", b'{"by_kind": 7}', b"\xff\xfe"])
def test_a_torn_file_of_a_run_is_made_again(tmp_path, content):
    (tmp_path / "before.json").write_bytes(content)
    assert checkpoint.kept(tmp_path / "before.json", report.values) is None
    assert checkpoint.kept(tmp_path / "missing.json", report.values) is None


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    pid = ended.pid
    (tmp_path / f".a.json.{pid}.tmp").write_text("half")
    (tmp_path / f".a.json.{os.getppid()}.tmp").write_text("another's")
    (tmp_path / ".a.json.notes.tmp").write_text("a user's")
    (tmp_path / f".out.{pid}.tmp").mkdir()
    data.atomic_write(tmp_path / "a.json", "{}")
    data.temporary(tmp_path / "out")
    assert {*os.listdir(tmp_path)} == {"a.json", ".a.json.notes.tmp", f".a.json.{os.getppid()}.tmp"}


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell that a process has ended")
def test_what_a_killed_process_left_is_removed_though_nobody_has_asked_for_its_end(tmp_path):
    """In a container, a killed program's own programs stay listed when they are killed, too."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    child.stdin.write(b"it runs\n")
    child.stdout.readline()                 # a program that is only about to start has no command line yet
    left = tmp_path / f".a.json.{child.pid}.tmp"
    left.write_text("half")
    data.temporary(tmp_path / "a.json")
    assert left.exists()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)                 # ended, and still listed
    data.temporary(tmp_path / "a.json")
    assert not left.exists()
    child.communicate()


# ---- servers ----
def test_a_server_that_drips_its_handshake_is_left_after_the_timeout(capsys):
    began = time.monotonic()
    with test_chat.raw_server(b"\x16\x03\x03\x3f\x00", b"\0") as url:
        url = url.replace("http:", "https:")
        assert test_chat.replies(url, test_chat.requests(1), timeout=.4, attempts=1) == {}
    assert time.monotonic() - began < 5
    assert "no answer within 0.4 seconds" in capsys.readouterr().err


def test_half_a_surrogate_pair_in_a_reply_is_kept_as_a_mark():
    said = test_chat.reply("a \ud800 b")
    with test_chat.server(lambda body, n: said) as (url, _):
        assert test_chat.replies(url, test_chat.requests(1)) == {"0": "a ? b"}


@pytest.mark.parametrize("text", ["http://me:hush@host/v1", "--judge=https://host/v1?api_key=hush",
                                  "cannot take http://me:hush@host:8/x?a=hush&b=hush here"])
def test_no_sentence_shows_a_urls_secrets(text):
    assert "hush" not in str(data.UserError(text)) and "host" in str(data.UserError(text))
    with pytest.raises(SystemExit) as caught:
        data.Parser(prog="x").parse_args([text])
    assert "hush" not in str(caught.value)


# ---- pictures of a record ----
def test_a_good_picture_is_read_as_before(tmp_path):
    picture(3, (30, 20)).save(tmp_path / "a.png")
    assert data.read_image(tmp_path / "a.png").size == data.image_size(tmp_path / "a.png") == (30, 20)
