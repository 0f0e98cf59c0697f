"""Ask a model about a picture: in the terminal, or on a small page of this machine.

    eval_hallu.py ask --adapter runs/NAME/adapter          the answers before and after training, side by side

Below each answer stands what its words owe to the picture: a word's log p with the picture minus that with a
blank one of its size, in nats. 0: the word would have come without looking. A word that the picture
contradicts is marked where the truth is known: for scenes of the built-in world.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of eval_hallu.py; run: python eval_hallu.py --help"))

import base64
import contextlib
import json
import math
import shutil
import textwrap
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import zip_longest
from pathlib import Path

import torch

import data
import lora
from data import UserError
from evaluation import benchmarks, objects, page
from model import ask, command, generation, vlm

BETA = 0.1                                          # of the reward: both papers'
MOST = 20 << 20                                     # bytes of a request: a picture of 15 MB
SHOWN = 8                                           # scenes on the page to choose from


# ---- a model, a picture, a question ----
@torch.no_grad()
def token_logps(m, image, question, answer):
    """log p of each token of a model's answer, its end included: (N,). image: in RGB, or None."""
    images = [image] if image else []
    sizes = tuple(one.size for one in images)
    prompt, response = m.front.prompt_ids(question, sizes), m.front.response_ids(answer)
    pair = data.Pair("the question", prompt, prompt, response, response, sizes, sizes)
    features = vlm.encode_images(m, data.Batch([pair], m.front.prepared(images)))
    if m.front.packs:
        row = data.pack([pair], {"chosen"}, m.front.positions)
        return vlm.packed_token_logps(m, row, features.images)
    return vlm.naive(m, [pair], features, {"chosen"}).chosen


def reward(m, image, question, answer):
    """BETA * (log p(answer) - the reference's), the sum over its tokens: what mDPO's losses compare."""
    policy = token_logps(m, image, question, answer).sum()
    with vlm.base_of(m) as base:
        return BETA * float(policy - token_logps(base, image, question, answer).sum())


def owed(m, image, question, answer):
    """[(word of an answer, nats that it owes to the picture)]; [] of a family that does not pack."""
    if not image or not m.front.packs or not answer:
        return []
    blank = data.rejected_image("blank", image, 0, "")
    gains = token_logps(m, image, question, answer) - token_logps(m, blank, question, answer)
    words, tokens = answer.split(), m.front.response_ids(answer)
    found = [0.0] * len(words)
    for n, gain in enumerate(gains[:-1].tolist(), 1):                    # without the end
        begun = len(m.front.tokenizer.decode(tokens[:n], skip_special_tokens=True).split())
        found[min(max(begun, 1), len(words)) - 1] += gain
    return list(zip(words, found, strict=True))


def answers(m, image, question, known, length=64):
    """{"before" and "after" training, or "answer": {"text", "words": see owed, "invented": words that the
    picture contradicts}}. known: the picture's, see scenes_of."""
    found, truth = {}, known.get(question, known.get(None))
    for name in ("before", "after") if lora.layers(m.model) else ("answer",):
        with lora.lora_disabled(m.model) if name == "before" else contextlib.nullcontext():
            text, = generation.generate(m, [[image] if image else []], [question], max_new_tokens=length)
            invented = objects.hallucinated(text, truth) if truth else []
            found[name] = {"text": text, "words": owed(m, image, question, text), "invented": invented}
    return found


# ---- pictures whose truth is known ----
def scenes_of(folder):
    """{a picture's path: {question: truth}} of a folder of scenes; {} where there is none. The truth of
    whatever else is asked is under None: the caption's."""
    found = {}
    if Path(folder, "scenes.jsonl").is_file():
        for line, question, path in benchmarks.questions("classroom", [folder]):
            known = found.setdefault(path, {})
            known[question] = line["truth"]
            if line["kind"] == "caption":
                known[None] = line["truth"]
    return found


# ---- in the terminal ----
def columns(found, width=None):
    """The answers as lines of text, next to each other; invented words are in *stars*."""
    width = width or shutil.get_terminal_size((100, 24)).columns - 1
    room, parts = (width - 3) // len(found), []
    for name, said in found.items():
        text = said["text"] or "(no answer)"
        for word in said["invented"]:
            text = text.replace(word, f"*{word}*")
        lines = [f"{name}:", *textwrap.wrap(text, room)]
        if said["words"]:
            words = " ".join(f"{word} {nats:+.1f}" for word, nats in said["words"])
            lines += ["owed to the picture, in nats:", *textwrap.wrap(words, room)]
        parts.append(lines)
    for row in zip_longest(*parts, fillvalue=""):
        yield " | ".join(line.ljust(room) for line in row).rstrip()


def talk(m, questions, path, known, length):
    """Prints each question, and below it what the model answers. path: of a picture, or None. known: as
    `answers` takes it."""
    image = data.read_image(path) if path else None
    print(f"about {path}" if path else "without a picture: give one with --image")
    if known:
        print(f"Questions that it knows: {' '.join(filter(None, known))}")
    for question in filter(None, map(str.strip, questions)):
        print(f"\n> {question}")
        found = answers(m, image, question, known, length)
        print(*columns(found), sep="\n", flush=True)


# ---- on a page ----
class Site(HTTPServer):
    """The page on 127.0.0.1, at any port that is free. /ask and /reward take and give JSON objects, whose
    pictures are data: URLs."""
    def __init__(self, m, scenes, length):
        super().__init__(("127.0.0.1", 0), Handler)
        self.m, self.scenes, self.length = m, scenes, length
        self.paths = {ask.image_url(path): path for path in list(scenes)[:SHOWN]}

    def page(self):
        shown = "".join(f'<button class="scene"><img alt="" class="pixel" src="{url}"></button>'
                        for url in self.paths)
        title, body = f"Ask {Path(self.m.front.folder).name}", BODY.replace("SCENES", shown)
        found = page.page(title, body, STYLE, SCRIPT)
        return found.replace("default-src 'none'", "default-src 'none';connect-src 'self'", 1)

    def ask(self, question, image):
        """-> {"answers": of `answers`, "reward": after training, with the whole picture; else None}"""
        picture, weighed = image and picture_of(image), None
        known = self.scenes.get(self.paths.get(image), {})
        found = answers(self.m, picture, question, known, self.length)
        if "after" in found:
            weighed = reward(self.m, picture, question, found["after"]["text"])
        return {"answers": found, "reward": weighed}

    def reward(self, question, answer, image, crop):
        """-> {"reward": of an answer when the picture is cut to crop: left, top, right, bottom, in shares}"""
        picture = picture_of(image)
        left, top, right, bottom = crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"the crop {crop} is not in the picture: give left, top, right, bottom, 0 to 1")
        w, h = picture.size
        box = math.floor(left * w), math.floor(top * h), math.ceil(right * w), math.ceil(bottom * h)
        return {"reward": reward(self.m, picture.crop(box), question, answer)}


def picture_of(url):
    """The image of a data: URL, in RGB."""
    return data.read_image(base64.b64decode(url.rpartition(",")[2]))


REQUESTS = {"/ask": {"question": str, "image": (str, None)},
            "/reward": {"question": str, "answer": str, "image": str, "crop": [float] * 4}}


class Handler(BaseHTTPRequestHandler):
    """Answers this machine's browser alone. Each request is answered whole or refused with a sentence."""
    timeout = 30                                             # seconds that a request may take to arrive

    def parse_request(self):
        """Whether a page of this very server asks, by the name of this machine; else the refusal is sent."""
        if not super().parse_request():
            return False
        port, host = self.server.server_port, self.headers.get("Host")
        here = host in (f"127.0.0.1:{port}", f"localhost:{port}")
        if here and self.headers.get("Origin") in (None, f"http://{host}"):
            return True
        self.send_error(403, f"this page is for 127.0.0.1:{port} alone")

    def do_GET(self):
        if self.path != "/":
            return self.send_error(404, "there is only /")
        self.send(200, "text/html", self.server.page())

    def do_POST(self):
        try:
            length, shape = int(self.headers.get("Content-Length", -1)), REQUESTS.get(self.path, {})
            if not 0 <= length <= MOST:
                return self.send_error(413, f"a request says how long it is, at most {MOST >> 20} MB")
            body = data.parse(self.rfile.read(length), "the request")
            if not shape or not command.fits(body, shape) or body.keys() != shape.keys():
                raise UserError(f"{self.path} takes a JSON object of {', '.join(shape) or 'nothing'}")
            run = self.server.ask if self.path == "/ask" else self.server.reward
            self.send(200, "application/json", json.dumps(run(**body)))
        except ValueError as error:                          # a UserError, or no number, or no base64
            self.send(400, "application/json", json.dumps({"error": str(error)}))

    def send(self, status, kind, text):
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


def serve(site):
    """Serve the page until Ctrl-C."""
    print(f"http://127.0.0.1:{site.server_port}/   Ctrl-C ends it", flush=True)
    with site, contextlib.suppress(KeyboardInterrupt):
        site.serve_forever()


STYLE = """
#frame{position:relative;touch-action:none;border:1px solid var(--line);border-radius:8px;overflow:hidden}
#frame.over{border-color:var(--c0)}#picture{width:100%;min-height:120px;border-radius:0}
#box{position:absolute;border:3px solid #fff;outline:2px solid #000;cursor:move}
.scene{padding:2px;border:1px solid var(--line);background:none;width:64px;cursor:pointer;border-radius:6px}
#form{display:flex;gap:8px;margin:0 0 14px}#question{flex:1;min-width:0}
#form input,#form button{font:inherit;padding:.45em .7em;border:1px solid var(--line);border-radius:6px;
background:var(--card);color:var(--ink)}.row>.left{flex:0 1 360px}.word small{display:block}
.word{display:inline-block;margin:.1em .5em .1em 0;text-align:center}input[type=range]{width:100%}
#scenes{display:flex;gap:6px;flex-wrap:wrap;margin:10px 0}
"""
BODY = """
<p class="soft">Choose a picture, or drop one here, and ask about it. The number below a word is what
it owes to the picture: its log p with the picture minus that with a blank one. Then move the box: the reward
changes with what is inside it.</p>
<div class="row"><div class="left">
<div id="frame"><img id="picture" alt="the picture"><div id="box" hidden></div></div>
<div id="scenes">SCENES</div>
<input type="file" id="file" accept="image/*" aria-label="a picture">
<p><label>size of the crop<input type="range" id="size" min="10" max="100" value="45"></label></p>
<p id="reward" aria-live="polite"></p>
</div><div>
<form id="form">
<input id="question" value="describe the picture ." aria-label="question"><button>Ask</button></form>
<div id="answers" class="grid" aria-live="polite"></div>
</div></div>
"""
SCRIPT = """
const $ = id => document.getElementById(id);
const state = {image: null, answer: null, whole: null, x: .3, y: .3, busy: false};
const form = (n) => (n >= 0 ? "+" : "\u2212") + Math.abs(n).toFixed(2);
async function post(path, body) {
  const reply = await fetch(path, {method: "POST", body: JSON.stringify(body)});
  const found = await reply.json().catch(() => ({error: "the server does not answer: is it still running?"}));
  if (found.error) throw new Error(found.error);
  return found;
}
function choose(url, pixel) {
  Object.assign(state, {image: url, answer: null, whole: null});
  $("picture").src = url;
  $("picture").className = pixel ? "pixel" : "";
  $("answers").replaceChildren();
  $("box").hidden = true;
  $("reward").textContent = "";
}
function read(file) {
  const reader = new FileReader();
  reader.onload = () => choose(reader.result, false);
  if (file) reader.readAsDataURL(file);
}
function element(tag, text, parent, kind) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  parent.append(made);
  return made;
}
function show(answers) {
  $("answers").replaceChildren();
  for (const [name, said] of Object.entries(answers)) {
    const card = element("div", "", $("answers"), "card");
    element("h3", name, card);
    const words = said.words.length ? said.words : said.text.split(" ").map(word => [word, null]);
    for (const [word, nats] of words) {
      const cell = element("span", "", card, "word");
      const invented = said.invented.some(each => each.toLowerCase() === word.toLowerCase());
      element(invented ? "mark" : "span", word, cell);
      if (nats !== null) element("small", form(nats), cell);
    }
  }
}
function place() {
  const share = $("size").value / 100;
  state.x = Math.min(Math.max(state.x, 0), 1 - share);
  state.y = Math.min(Math.max(state.y, 0), 1 - share);
  Object.assign($("box").style, {left: 100 * state.x + "%", top: 100 * state.y + "%",
                                 width: 100 * share + "%", height: 100 * share + "%"});
  return [state.x, state.y, Math.min(1, state.x + share), Math.min(1, state.y + share)];
}
async function weigh() {
  const crop = place();
  if (state.whole === null || state.busy) return;
  state.busy = true;
  try {
    const question = state.question, answer = state.answer, image = state.image;
    const found = await post("/reward", {question, answer, image, crop});
    $("reward").textContent = `reward of the last answer: ${form(state.whole)} with the whole picture, ` +
      `${form(found.reward)} with the crop; CoPO compares the two`;
  } catch (error) { $("reward").textContent = error.message; }
  state.busy = false;
  if (String(crop) !== String(place())) weigh();
}
$("form").onsubmit = async event => {
  event.preventDefault();
  $("answers").textContent = "...";
  try {
    const question = $("question").value;
    const found = await post("/ask", {question, image: state.image});
    show(found.answers);
    const last = Object.values(found.answers).at(-1).text;
    Object.assign(state, {question, answer: last, whole: found.reward});
    $("box").hidden = state.image === null || found.reward === null;
    if (!$("box").hidden) weigh();
  } catch (error) { $("answers").textContent = error.message; }
};
$("file").onchange = event => read(event.target.files[0]);
$("frame").ondragover = event => { event.preventDefault(); $("frame").className = "over"; };
$("frame").ondragleave = () => { $("frame").className = ""; };
$("frame").ondrop = event => {
  event.preventDefault();
  $("frame").className = "";
  read(event.dataTransfer.files[0]);
};
$("box").onpointerdown = event => $("box").setPointerCapture(event.pointerId);
$("box").onpointermove = event => {
  if (!event.buttons) return;
  const frame = $("picture").getBoundingClientRect();
  state.x += event.movementX / frame.width;
  state.y += event.movementY / frame.height;
  weigh();
};
$("size").oninput = weigh;
for (const button of document.querySelectorAll(".scene"))
  button.onclick = () => choose(button.firstChild.src, true);
document.querySelector(".scene")?.click();
"""
