"""Ask a model on a page: choose or drop a picture, ask, and move a crop to see the reward change.

    python eval_hallu.py ask --adapter runs/NAME/adapter --page         starts it; its options are these
    python classroom/ask.py ask --adapter runs/NAME/adapter             the same

The page is served on 127.0.0.1 and answers this machine's browser alone; Ctrl-C ends it.
"""
import base64
import contextlib
import json
import math
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))          # the repository
import data  # noqa: E402
import eval_hallu  # noqa: E402
from data import UserError  # noqa: E402
from evaluation import page  # noqa: E402
from model import ask, command  # noqa: E402

MOST = 20 << 20                                     # bytes of a request: a picture of 15 MB
SHOWN = 8                                           # scenes on the page to choose from
BETA = 0.1                                          # of the reward: both papers'


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
        from evaluation import dialogue  # and with it torch
        picture, weighed = image and picture_of(image), None
        known = self.scenes.get(self.paths.get(image), {})
        found = dialogue.answers(self.m, picture, question, known, self.length)
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


def reward(m, image, question, answer):
    """BETA * (log p(answer) - the reference's), the sum over its tokens: what mDPO's losses compare."""
    from evaluation import dialogue
    from model import vlm
    policy = dialogue.token_logps(m, image, question, answer).sum()
    with vlm.base_of(m) as base:
        return BETA * float(policy - dialogue.token_logps(base, image, question, answer).sum())


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


def main():
    o = eval_hallu.parse()
    try:
        m, scenes, _ = eval_hallu.asked(o)
        serve(Site(m, scenes, o.max_new_tokens))
    except (UserError, OSError) as error:
        sys.exit(f"ask.py: {error}")


if __name__ == "__main__":
    main()
