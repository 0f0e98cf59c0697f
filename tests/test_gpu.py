"""bench/gpu.py with tiny shapes: every part ends with numbers, whatever kills it on the way."""
import importlib.util
import json
import math
import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from functools import cache

import pytest
from conftest import ROOT, warmed

sys.path.append(str(ROOT / "bench"))
import gpu  # noqa: E402
import gpu_parts  # noqa: E402

ABOUT = {"machine": "M", "versions": {"torch": "2"}, "date": "2026-01-01", "commit": "c",
         "command": "python x", "tiny": False}
NEEDS = {"peft": "peft", "trl_equality": "trl", "trl": "trl"}


class Killed(BaseException):
    """Here in the place of a SIGKILL."""


def call(out, *arguments):
    """The command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [gpu.__file__, "--out", str(out), "--tiny", *arguments])
        gpu.main()


def lines_of(out):
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def expected():
    """The parts that can run here: TRL and PEFT may be absent."""
    return {name for name in gpu.PARTS
            if (package := NEEDS.get(name.split()[0])) is None or importlib.util.find_spec(package)}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, section, what was asked of the network) of a run that is killed after each of its parts.

    First really, in a fork, then by an exception, which spares the models: all calls share them.
    """
    out, asked = tmp_path_factory.mktemp("gpu"), []
    path, keep = out / "gpu.jsonl", gpu.keep
    warmed()
    process = multiprocessing.get_context("fork").Process(target=call, args=(out,))
    process.start()
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert len(gpu.read(path)) >= 2 and process.exitcode == -signal.SIGKILL

    def keep_and_die(path, line):
        keep(path, line)
        raise Killed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *where, **options: asked.append(where))
        patch.setattr(gpu_parts, "Bench", cache(gpu_parts.Bench))
        patch.setattr(gpu, "keep", keep_and_die)
        while len(gpu.read(path)) < len(gpu.PARTS) - 1:                # the last one are the hours
            before = path.read_bytes()
            with pytest.raises(Killed):
                call(out)
            assert path.read_bytes().startswith(before)
        patch.setattr(gpu, "keep", keep)
        call(out)
    call(out, "--minutes", "0", "--results", str(out / "RESULTS.md"))
    return out, (out / "RESULTS.md").read_text(), asked


def numbers(found):
    for value in found.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int | float):
            yield value


def test_every_part_ends_with_finite_numbers_and_none_is_skipped(rehearsal):
    out, section, _ = rehearsal
    found = {line["part"]: line["found"] for line in lines_of(out) if "found" in line}
    assert found.keys() == expected()
    for name, part in found.items():
        values = [*numbers(part)]
        assert values and all(map(math.isfinite, values)), name
    assert all(part["ok"] for part in found.values() if "ok" in part)
    if found.keys() == gpu.PARTS.keys():
        assert "Every part ran." in section


def test_a_part_is_run_once_however_often_the_command_is_killed(rehearsal):
    out, _, _ = rehearsal
    names = [line["part"] for line in lines_of(out) if "found" in line and line["part"] != "hours"]
    assert len(names) == len({*names})


def test_nothing_is_asked_of_the_network(rehearsal):
    assert rehearsal[2] == []


def test_the_section_says_that_it_is_a_rehearsal(rehearsal):
    _, section, _ = rehearsal
    assert "for a GPU: not run" in section.splitlines()[1] and "No number here says anything" in section
    assert section.count("| dpo | 8 | on |") == 2 and "| Qwen2.5-VL-3B, a step of two pairs" in section


# ---- what does not run

@pytest.fixture
def two(monkeypatch):
    """Two parts that take no time."""
    monkeypatch.setattr(gpu, "PARTS", {"hardware": 0.1, "packed": 0.1})
    for name in gpu.PARTS:
        monkeypatch.setattr(gpu_parts, name, lambda bench: {"ok": True, "cores": 1})
    return monkeypatch


def test_a_part_that_fails_leaves_its_reason_and_is_tried_again_after_the_rest(two, tmp_path):
    def full(bench):
        raise RuntimeError("out of memory\nby far")
    two.setattr(gpu_parts, "hardware", full)
    call(tmp_path)
    first, second, _ = lines_of(tmp_path)
    assert first["failed"] == "RuntimeError: out of memory" and second["found"]["ok"]
    assert "Not run: hardware (RuntimeError: out of memory)" in (tmp_path / "gpu.md").read_text()
    two.setattr(gpu_parts, "hardware", lambda bench: {"cores": 2})
    two.setitem(gpu.PARTS, "peft", 0.1)
    two.setattr(gpu_parts, "peft", lambda bench: {"ok": True})
    call(tmp_path)
    assert [line["part"] for line in lines_of(tmp_path)[3:]] == ["peft", "hardware", "hours"]
    assert "Every part ran." in (tmp_path / "gpu.md").read_text()


def test_what_does_not_fit_into_the_minutes_is_skipped_and_listed(two, tmp_path, capsys):
    call(tmp_path, "--minutes", "1e-9")
    assert "packed: skipped" in capsys.readouterr().out
    assert "Not run: hardware (skipped), packed (skipped)." in (tmp_path / "gpu.md").read_text()


def test_a_part_runs_only_if_its_estimate_fits(two, tmp_path):
    """Three seconds are left for parts of half a minute and of less than a second."""
    two.setattr(gpu_parts.Bench, "__init__", lambda bench, tiny: vars(bench).update(tiny=False, device="cpu"))
    two.setattr(gpu, "PARTS", {"hardware": 0.5, "packed": 0.01})
    call(tmp_path, "--minutes", "0.05")
    assert [line["part"] for line in lines_of(tmp_path)] == ["packed", "hours"]


def test_a_part_that_takes_too_long_is_ended(two, tmp_path):
    two.setattr(gpu_parts, "hardware", lambda bench: time.sleep(60))
    call(tmp_path, "--minutes", "0.02")
    assert lines_of(tmp_path)[0]["failed"] == "the minutes were over"


def test_another_machines_folder_is_refused(two, tmp_path):
    gpu.keep(tmp_path / "gpu.jsonl", {"part": "hardware", "seconds": 1, "found": {}, "about": ABOUT})
    with pytest.raises(SystemExit, match="begun with machine M"):
        call(tmp_path)


# ---- the tables

def line(part, **found):
    return {"part": part, "seconds": 1.0, "found": found, "about": ABOUT}


def test_the_hours_are_of_the_best_setting():
    """PDS-DPO: 9000 pairs at 5 a second, and again at 10 a second."""
    def step(first, cached, micro_batch, compiled=False):
        return line(f"step dpo {micro_batch}", loss="dpo", micro_batch=micro_batch, checkpointing=False,
                    compile=compiled, first={"pairs_per_second": first}, cached={"pairs_per_second": cached})
    lines = {"step dpo 2": step(4, 8, 2), "step dpo 8": step(4, 10, 8),
             "step dpo 8 compile": step(5, 10, 8, compiled=True),
             "trl 2": line("trl 2", micro_batch=2, checkpointing=False, dpo={"pairs_per_second": 2},
                           mdpo={"pairs_per_second": 1})}
    found = gpu.hours(lines)
    assert found == pytest.approx({"PDS-DPO": 0.75, "PDS-DPO with TRL": 2.5, "mDPO with TRL": 8.333333})
    with pytest.raises(ValueError, match="no step"):
        gpu.hours({})


def test_the_model_of_another_family_has_the_published_number_of_weights(tmp_path):
    """Qwen2.5-VL-3B-Instruct, by its model.safetensors.index.json: 7,509,245,952 bytes of bfloat16."""
    import qwen3b
    from transformers import Qwen2_5_VLForConditionalGeneration
    model = qwen3b.random(qwen3b.write(tmp_path, tiny=False), "bfloat16", "meta",
                          Qwen2_5_VLForConditionalGeneration)
    assert sum(p.nbytes for p in model.parameters()) == 7_509_245_952


def test_a_gpus_section_is_no_rehearsal():
    text = "\n".join(gpu.section({"hardware": line("hardware", memory_gib=139.0)}))
    assert "## On a GPU" in text and "rehearsal" not in text and "memory gib 139" in text
    assert "step dpo 2 (skipped)" in text


def test_the_repository_can_be_sent_there():
    """What the command needs is in the repository, which stays small."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.splitlines()]
    assert sum(file.stat().st_size for file in files if file.exists()) < 60e6
