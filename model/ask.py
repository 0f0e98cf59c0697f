"""Ask a model about a text or about images: a server by URL, a model folder, or a file of saved replies.

    asked = [Question("7", "What is this?", ["dog.jpg"])]
    said = ask("http://localhost:8000/v1", asked, "replies.jsonl")         # {"7": {"reply": "A dog.", ...}}
    said = ask("https://api.openai.com/v1", asked, "replies.jsonl", model="gpt-4o")
    said = ask("llava-v1.6-mistral-7b-hf", asked, "replies.jsonl")         # a folder, loaded here
    said = ask("replies.jsonl", asked)                                     # what was said before

A folder is a vision-language model that vlm.py loads, or a language model that is asked about texts alone;
serve any other and give its URL. A server's key is read from OPENAI_API_KEY and written nowhere. No torch is
imported until a folder is asked.

Replies are appended to `out` as they come; the same call asks only for those that are missing. A request that
fails is tried again, a limited number of times, then counted and left out: no reply is made up. One that is
cut off (finish reason `length`) is asked for again as well; its row is kept and says so: see `whole`.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import base64
import contextlib
import functools
import hashlib
import http.client
import io
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

import data
from data import UserError
from model import command, family
from model.command import is_url

TIMEOUT = 60            # seconds of one attempt, all of it
ATTEMPTS = 4            # of one request
BACKOFF = 0.5           # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 60.0     # seconds: a server's Retry-After beyond this is cut to it
GIVE_UP = 24            # requests that failed in a row: the server is down, the rest is not asked
LARGEST = 1 << 24       # bytes of a reply
SMALL = 160             # pixels: pages show smaller pictures as PNG
CUT = ("length", "content_filter")      # finish reasons of a reply that lacks its end
EVENTS = ("data:", "event:", ":")       # how a reply begins that was not asked to come in pieces
# The name under which a server that refuses a setting gets it instead; what is under "" is not sent.
OTHERWISE = {"max_tokens": "max_completion_tokens", "temperature": ""}


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    images: tuple = ()              # paths; they come before the text


def ask(source, questions, out=None, *, description="asking", **options):
    """-> {id: {"reply", ...}} in the questions' order; what got no reply is absent, counted on stderr.

    source, options: as `connect` takes them, or a file of saved replies. out: JSON lines {"id", "hash",
    "asked", "reply"}, to continue from. Raises UserError for a wrong source, and if a server refuses us
    (401, 404).
    """
    asked = {q.id: digest(q) for q in questions}
    source = str(source)
    if not is_url(source) and (source.endswith((".jsonl", ".json")) or os.path.isfile(source)):
        rows, reason = saved(source, asked), f"{source} does not contain it"
    else:
        model = connect(source, **options)
        rows = replied(model, questions, asked, out, description)
        reason = model.reason
    found = {i: rows[i] for i in asked if i in rows}
    lost, cut = len(asked) - len(found), sum(not whole(row) for row in found.values())
    if lost:
        print(f"{description}: {lost} of {len(asked)} requests got no reply (last: {reason})",
              file=sys.stderr)
    if cut:
        print(f"{description}: {cut} of {len(asked)} replies are cut off", file=sys.stderr)
    return found


def replied(model, questions, asked, out, description):
    """{id: row} of what a Server or Folder replies; asked: {id: digest}. Rows that `out` has are kept."""
    rows = {}
    made = {i: {"id": i, "hash": hashed([key, model.settings]), "asked": key} for i, key in asked.items()}
    if out:
        rows = command.Store(out).kept(made.values())
    done = {i for i, row in rows.items() if model.accept(row)}
    found = model.ask(questions, done)
    for i, row in tqdm(found, description, len(asked), initial=len(done), unit="reply", disable=None):
        rows[i] = made[i] | row
        if out:
            data.append_jsonl(out, rows[i])
    return rows


def whole(row):
    """Whether a reply was not cut off, as far as its row says."""
    return row.get("finish") not in CUT


def connect(source, *, model=None, max_tokens=512, temperature=0.0, seed=None, accept=whole, workers=8,
            **loading):
    """-> a Server or Folder: ask(questions, done) yields (id, {"reply", ...}) of those not in `done`.

    source: an http(s) URL of an OpenAI-compatible server or a model folder. model: the server's name for it;
    None lets the server choose. accept: row -> bool; a server is asked again for a reply that it rejects,
    also in a later call. The last attempt's is kept all the same: what cannot be read is for the caller to
    count. loading: of a Folder.
    """
    settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if is_url(source):
        return Server(source, settings, accept, workers)
    source = fetched(source)
    if not os.path.isdir(source):
        raise UserError(f"{public(source)} is not a URL, a file of replies or a model folder; give one")
    return Folder(Path(source), settings | {"model": command.identity(source)}, **loading)


def fetched(source):
    """A model's path, which the hub may have; anything else as it is. Raises UserError."""
    import lora
    return lora.fetched(source)


def public(source):
    """A source as it may be shown and written: a URL without user, password and query."""
    return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", source) if "//" in source else source


def image_url(path, side=None):
    """A path's or bytes' image as a data: URL, no larger than `side` pixels if that is given. In its own
    size, a JPEG or PNG keeps its bytes, and any other format becomes a PNG."""
    raw = path if isinstance(path, bytes) else data.read_bytes(path)
    kind = {b"\xff\xd8\xff": "jpeg", b"\x89PN": "png"}.get(raw[:3])
    if side or not kind:
        image, buffer = data.read_image(path), io.BytesIO()
        if side:
            image.thumbnail((side, side))
        kind = "jpeg" if side and max(image.size) > SMALL else "png"
        image.save(buffer, kind)
        raw = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def messages(text, images=()):
    """A user's turn as servers take it. images: the text that goes with each, such as its data URL."""
    content = [*images, {"type": "text", "text": text}] if images else text
    return [{"role": "user", "content": content}]


def digest(question):
    """16 hex digits over what is asked: the text, and the bytes of the images rather than their paths."""
    images = [{"image": hashlib.sha256(data.read_bytes(path)).hexdigest()} for path in question.images]
    return hashed(messages(question.text, images))


def hashed(value):
    """16 hex digits over what JSON can hold; of a Question in it counts the digest."""
    return command.fingerprint(json.dumps(value, sort_keys=True, default=digest).encode())


def reply_of(answer):
    """(text, finish reason) in a server's answer, or in one of a batch's; where it is no reply: None (or "")
    and what it is."""
    try:
        choice = answer.get("response", {"body": answer})["body"]["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text if part["type"] == "text")
        if text and not text.isspace():
            return text.encode("utf-8", "replace").decode(), finish         # no half of a surrogate pair
        if choice["message"].get("refusal"):
            return None, "a refusal"
        return "", f"an empty reply ({finish})"
    except (KeyError, IndexError, TypeError, AttributeError):
        failed = isinstance(answer, dict) and answer.get("error")
        return None, "an error" if failed else "no choices"


# ---- a file ----
def saved(path, asked):
    """{id: row} of a file's replies to what is asked, {id: digest}; "asked" is None where it is not said.

    JSON lines or a list of {"id" or "question_id", "reply" or "judge_reply"}; servers' answers (`choices`) in
    the order of the questions, as MMHal's script keeps them; what OpenAI's Batch API returns. A line that
    says what was asked, as `ask` writes it, is refused where something else is asked now. Raises UserError.
    """
    rows, others, ids = {}, set(), [*asked]
    lines = [line for line in data.read_records(path) if not line.get("error")]
    for number, line in enumerate(lines):
        name, reply, finish = said_in(line)
        if name is None and len(lines) == len(asked):
            name = ids[number]
        if reply is None and finish:                    # a server's refusal or error
            continue
        if name is None or not isinstance(reply, str):
            raise UserError(f"{path}: record {number + 1} of {len(lines)} has no id or no reply (`reply`, "
                            f"`judge_reply`, `choices`); only {len(asked)} can do without ids")
        name, meant = str(name), line.get("asked")
        if meant not in (None, asked.get(name)):
            others.add(name)                            # perhaps an older line, which a later one replaces
            continue
        row = line | {"reply": reply, "asked": meant, "finish": finish}
        if meant is None and rows.get(name, row)["reply"] != reply:
            raise UserError(f"{path}: id {name} has two different replies; keep one of them")
        rows[name] = row
    if wrong := sorted(others & asked.keys() - rows.keys()):
        raise UserError(f"{path} replies to other requests ({len(wrong)} ids, first {wrong[0]}): the answers "
                        "or the prompt have changed since; ask again")
    return rows


def said_in(line):
    """(id, reply, finish reason) of a line; None for what is missing."""
    if line.keys() & {"custom_id", "choices"}:          # of the Batch API; an answer's own id says nothing
        return line.get("custom_id"), *reply_of(line)
    name, reply = line.get("id", line.get("question_id")), line.get("reply", line.get("judge_reply"))
    return name, reply, line.get("finish")


# ---- a server ----
@dataclass
class Server:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, OpenAI itself.

    The key in OPENAI_API_KEY goes to this host only: no redirect is followed, no proxy is asked. Neither the
    key nor the URL's query is ever shown.
    """
    url: str
    settings: dict
    accept: object                  # row -> whether its reply is acceptable
    workers: int

    def __post_init__(self):
        self.reason = ""                                # of the last failure, and how many of each kind
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        try:
            parts = urllib.parse.urlsplit(self.url)
            port = parts.port or {"http": 80, "https": 443}[parts.scheme]
            if not parts.hostname or "@" in parts.netloc or parts.port == 0:
                raise ValueError
        except ValueError:                              # also of a bracket, or of a port that is no number
            raise UserError("a URL cannot be used: give a server's URL, without user and password; a key "
                            "belongs in the variable OPENAI_API_KEY") from None
        self.host, self.address = parts.netloc, (parts.hostname, port)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        words = re.split("[&=]", parts.query)
        words = {self.key, *words, *map(urllib.parse.unquote, words)}
        self.secrets = sorted([text for text in words if len(text) > 3], key=len, reverse=True)
        base = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.target = f"{base}/chat/completions?{parts.query}".rstrip("?")

    def ask(self, questions, done=()):
        """Yield (id, {"reply", "model", "finish"}) as the replies come; failures are skipped."""
        body = {name: value for name, value in self.settings.items() if value is not None}
        failed, kinds = 0, Counter()
        missing = [question for question in questions if question.id not in done]
        self.stop = threading.Event()                   # for requests that are under way at the end
        with ThreadPool(self.workers) as pool:
            try:
                for id, row, reason in pool.imap_unordered(functools.partial(self.one, body), missing):
                    if row:
                        failed = 0
                        yield id, row
                        continue
                    failed += 1
                    kinds[reason.partition(":")[0]] += 1
                    self.reason = f"{reason}; in all {dict(kinds)}"
                    if failed == GIVE_UP:
                        self.reason += f"; {failed} requests in a row failed and the rest was not asked"
                        break
            finally:
                self.stop.set()
        if "" in body:
            print(f"{self.host} takes no temperature and was asked without one", file=sys.stderr)

    def one(self, body, question):
        """-> (id, row, "") or (id, None, why the last attempt failed)."""
        images = [{"type": "image_url", "image_url": {"url": image_url(path)}} for path in question.images]
        asked = messages(question.text, images)
        for attempt in range(1, ATTEMPTS + 1):
            sent = {"messages": asked} | body
            sent.pop("", None)
            row, reason, wait = self.request(sent)
            for name, other in OTHERWISE.items():
                if wait is None and name in sent and name in reason:
                    body[other] = body.pop(name, sent[name])            # for all that is asked from now on
                    wait = 0
            last = attempt == ATTEMPTS or wait is None
            if row and (last or self.accept(row)):
                return question.id, row, ""
            if last or self.stop.wait(max(wait, BACKOFF * 2 ** (attempt - 1))):
                break
        return question.id, None, f"{reason}, attempt {attempt} of {ATTEMPTS}"

    def request(self, body):
        """-> (the reply's row or None, the reason, seconds until another attempt).

        Seconds: at least so many; None if another attempt would not help. Raises UserError if the server
        refuses us.
        """
        status, after, text = self.exchange(body)
        said, answer = " ".join(text.split()), None
        for secret in self.secrets:                     # some servers repeat what they were given
            said = said.replace(secret, "***")
        said = said[:200]
        if not status:
            return None, said, 0
        if status < 300:
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(text)
            reply, kind = reply_of(answer)
            if reply:
                return {"reply": reply, "model": answer.get("model"), "finish": kind}, "", 0
            if said.startswith(EVENTS):
                kind = "a stream of events"
            return None, f"{kind}: no reply in {said!r}", 0
        reason = f"the server answered {status}: {said}"
        if status in (400, 413, 422):                   # about this one request: the others may succeed
            return None, reason, None
        if status in (408, 425, 429) or status >= 500:
            return None, reason, min(float(after), LONGEST_WAIT) if after.isdecimal() else 0
        raise UserError(f"{self.host}: {reason}; check the URL, the model's name and OPENAI_API_KEY")

    def exchange(self, body):
        """-> (status, Retry-After, text), or (0, "", why), within the timeout, whatever the server does."""
        end = time.monotonic() + TIMEOUT
        headers = {"Content-Type": "application/json", "Host": self.host}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection = http.client.HTTPConnection(*self.address, TIMEOUT / 2)
            with contextlib.closing(connection):
                connection.connect()                                    # to one of two addresses, often
                connection.sock.settimeout(TIMEOUT)
                # the socket's own timeout starts anew with each byte
                timer = threading.Timer(end - time.monotonic(), shut, [connection.sock.dup()])
                timer.daemon = True                                     # a process that ends does not wait
                timer.start()
                try:
                    if self.tls:
                        connection.sock = self.tls.wrap_socket(connection.sock,
                                                               server_hostname=connection.host)
                    connection.request("POST", self.target, json.dumps(body), headers)
                    response = connection.getresponse()
                    text = response.read(LARGEST).decode("utf-8", "replace")
                finally:
                    timer.cancel()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                return 0, "", f"no answer within {TIMEOUT:g} seconds"
            return 0, "", f"no connection: {self.host}, {error or type(error).__name__}"
        return response.status, response.headers.get("Retry-After", ""), text


def shut(connected):
    """End what another thread waits for on a socket, which may be closed already."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


# ---- a folder ----
@dataclass
class Folder:
    """A model folder, loaded when it is first asked: a vision-language model, or one of texts alone.

    batch: questions at once. device, dtype: as command.place and command.dtype take them. template: of a
    vision-language model's prompts, as vlm.load takes it.
    """
    source: Path
    settings: dict
    batch: int = 8
    device: str = ""
    dtype: str = "auto"
    template: str | None = None

    reason, accept = "", bool

    def ask(self, questions, done=()):
        """Yield (id, {"reply", "finish"}).

        Batches are those of the whole list, so that a continued call draws the same tokens as the first:
        a batch that lacks a reply is computed again as a whole.
        """
        from model import generation
        seed, temperature = None, self.settings["temperature"]
        for batch in data.chunks(questions, self.batch):
            if all(q.id in done for q in batch):
                continue
            if temperature:
                seed = data.hash64(self.settings["seed"], batch[0].id) >> 1
            images = [[*map(data.read_image, q.images)] for q in batch]
            said = generation.complete(self.model, images, [q.text for q in batch],
                                       self.settings["max_tokens"], self.batch, seed, temperature)
            for question, (text, ended) in zip(batch, said, strict=True):
                if question.id not in done:
                    yield question.id, {"reply": text, "finish": "stop" if ended else "length"}

    @functools.cached_property
    def model(self):
        """A VLM. Raises UserError."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from model import front, vlm
        device = command.place(self.device)
        dtype = command.dtype(self.dtype, device)
        try:
            if "vision_config" in data.read_json(self.source / "config.json", {}):
                return vlm.load(self.source, dtype=dtype, device=device, template=self.template)
            tokenizer = data.from_folder(AutoTokenizer, self.source, "tokenizer")
            model = data.from_folder(AutoModelForCausalLM, self.source, "chat model", dtype=dtype)
        except UserError as error:
            raise UserError(f"{error}; or serve it, with vLLM for example, and give its URL") from None
        if not tokenizer.chat_template:
            raise UserError(f"{self.source} has no chat template; give a model that was trained to chat")
        front.check_template(self.source, tokenizer, tokenizer.chat_template, messages("QUESTION"))
        model.config.image_token_id = len(tokenizer)                # none of its tokens
        texts = Texts(self.source, model.config, tokenizer, None, tokenizer.chat_template, "of a text model")
        return vlm.VLM(texts, model.to(device).eval(), len(tokenizer))


class Texts(family.Family):
    """What is in front of a language model that is asked about texts alone."""
    def messages(self, question, n_images, history=()):
        return messages(question)                       # no place for an image: see prompt_ids
