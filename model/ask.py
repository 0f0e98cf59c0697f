"""Ask a model about a text or about images: a server by URL, a model folder, or a file of saved replies.

    asked = [Question("7", "What is this?", ["dog.jpg"])]
    said = replies("http://localhost:8000/v1", asked, "replies.jsonl")                # {"7": "A dog."}
    said = replies("https://api.openai.com/v1", asked, "replies.jsonl", model="gpt-4o")
    said = replies("llava-v1.6-mistral-7b-hf", asked, "replies.jsonl")                # a folder, loaded here
    said = replies("replies.jsonl", asked)                                            # what was said before

A folder is a vision-language model that vlm.py loads, or a language model that is asked about texts alone;
serve any other and give its URL. A server's key is read from OPENAI_API_KEY and written nowhere. No torch is
imported until a folder is asked.

Replies are appended to `out` as they come; the same call asks only for those that are missing. A request that
fails is tried again, a limited number of times, then counted and left out: no reply is made up.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

import concurrent.futures
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import socket
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import data
from data import UserError
from model import command

BACKOFF = 0.5           # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 60.0     # seconds: a server's Retry-After beyond this is cut to it
GIVE_UP = 24            # requests that failed in a row: the server is down, the rest is not asked
LARGEST = 1 << 24       # bytes of a reply
SERVE = "or serve it, with vLLM for example, and give its URL"


@dataclass(frozen=True)
class Question:
    id: str
    text: str
    images: tuple = ()              # paths; they come before the text


def replies(source, questions, out=None, **options):
    """`ask`, and of each row the reply alone: {id: text}."""
    return {i: row["reply"] for i, row in ask(source, questions, out, **options).items()}


def ask(source, questions, out=None, *, description="asking", **options):
    """-> {id: {"reply", ...}} in the questions' order; what got no reply is absent, counted on stderr.

    source, options: as `connect` takes them, or what it returned. out: JSON lines {"id", "hash", "asked",
    "reply"}, to continue from. Raises UserError for a wrong source, and if a server refuses us (401, 404).
    """
    asked = {q.id: digest(q) for q in questions}
    if repeated := len(questions) - len(asked):
        raise UserError(f"{description}: {repeated} of {len(questions)} requests repeat an id; give each an "
                        "id of its own")
    model, rows = connect(source, **options), {}
    made = {i: {"id": i, "hash": _hash([key, model.settings]), "asked": key} for i, key in asked.items()}
    if isinstance(model, File):
        out = None
    if out:
        rows = command.Store(out).kept(made.values())
    done = {i for i, row in rows.items() if model.accept(row["reply"])}
    with contextlib.closing(model.ask(questions, done)) as found:
        for i, row in tqdm(found, description, len(asked), initial=len(done), unit="reply",
                           disable=None if out else True):
            rows[i] = made[i] | row
            if out:
                data.append_jsonl(out, rows[i])
    if lost := len(asked) - len(rows):
        again = "; the same command asks only for them" if out else ""
        print(f"{description}: {lost} of {len(asked)} requests got no reply (last: {model.reason}){again}",
              file=sys.stderr)
    return {i: rows[i] for i in asked if i in rows}


def anything(reply):
    return True


def connect(source, *, model=None, max_tokens=512, temperature=0.0, seed=None, accept=anything, timeout=60,
            attempts=4, workers=8, **loading):
    """-> a Server, File or Folder: ask(questions, done) yields (id, {"reply", ...}) of those not in `done`.

    source: an http(s) URL of an OpenAI-compatible server, a file of saved replies or a model folder. model:
    the server's name for it; None if it serves one. accept: reply -> bool; a server is asked again for a
    reply that it rejects, also in a later call. The last attempt's is kept all the same: what cannot be
    read is for the caller to count. timeout: seconds of one attempt, all of it. loading: of a Folder.
    """
    if isinstance(source, Server | File | Folder):
        return source
    source = str(source)
    settings = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if is_url(source):
        return Server(source, settings, timeout, attempts, workers, accept)
    if source.endswith((".jsonl", ".json")) or Path(source).is_file():
        return File(source)
    return Folder(source, settings, **loading)


def is_url(source):
    return re.match("https?://", source) is not None


def public(source):
    """A source as it may be shown and written: a URL without user, password and query."""
    return re.sub(r"(?<=//)[^/?#]*@|[?#].*", "", source) if is_url(source) else source


def messages(text, images=()):
    """A user's turn as servers take it. images: the text that goes with each, such as its data URL."""
    content = [*images, {"type": "text", "text": text}] if images else text
    return [{"role": "user", "content": content}]


def digest(question):
    """16 hex digits over what is asked: the text, and the bytes of the images rather than their paths."""
    images = [{"image": hashlib.sha256(data.read_bytes(path)).hexdigest()} for path in question.images]
    return _hash(messages(question.text, images))


def _hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def reply_of(answer):
    """The text in a server's answer; None if there is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return text if isinstance(text, str) else None


# ---- a file ----
class File:
    """Saved replies, JSON lines or a list of them.

    {"id" or "question_id", "reply" or "judge_reply"}; servers' answers (`choices`) in the order of the
    questions, as MMHal's script keeps them; what OpenAI's Batch API returns. A line that says what was asked,
    as `ask` writes it, is refused where something else is asked now.
    """
    settings, accept = None, staticmethod(anything)

    def __init__(self, path):
        self.path, self.reason = path, f"{path} does not contain it"

    def ask(self, questions, done=()):
        """Yield (id, {..., "reply", "asked": None if the file does not say it}). Raises UserError."""
        asked, rows, other = {q.id: digest(q) for q in questions}, {}, set()
        lines = [line for line in data.read_records(self.path) if not line.get("error")]
        for number, line in enumerate(lines):
            name, reply = self.pair(line)
            if name is None and len(lines) == len(asked):
                name = questions[number].id
            if name is None or not isinstance(reply, str):
                raise UserError(f"{self.path}: record {number + 1} of {len(lines)} has no id or no reply "
                                f"(`reply`, `judge_reply`, `choices`); only {len(asked)} can do without ids")
            name, row = str(name), {"asked": None} | line | {"reply": reply}
            if row["asked"] not in (None, asked.get(name)):
                other.add(name)                         # perhaps an older line, which a later one replaces
                continue
            if row["asked"] is None and rows.get(name, row)["reply"] != reply:
                raise UserError(f"{self.path}: id {name} has two different replies; keep one of them")
            rows[name] = row
        if wrong := sorted(other & asked.keys() - rows.keys()):
            raise UserError(f"{self.path} replies to other requests ({len(wrong)} ids, first {wrong[0]}): "
                            "the answers or the prompt have changed since; ask again")
        yield from ((i, rows[i]) for i in asked if i in rows)

    def pair(self, line):
        """(id, reply) of a line; None for a missing one."""
        if "custom_id" in line:                         # OpenAI's Batch API
            return line["custom_id"], reply_of((line.get("response") or {}).get("body"))
        if "choices" in line:                           # its id is the server's
            return None, reply_of(line)
        return line.get("id", line.get("question_id")), line.get("reply", line.get("judge_reply"))


# ---- a server ----
@dataclass
class Server:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, OpenAI itself.

    The key in OPENAI_API_KEY goes to this host only: no redirect is followed, no proxy is asked. Neither the
    key nor the URL's query is ever shown.
    """
    url: str
    settings: dict
    timeout: float
    attempts: int
    workers: int
    accept: object                  # reply -> whether it is acceptable

    def __post_init__(self):
        self.reason, self.stop, valid = "", threading.Event(), False        # reason: of the last failure
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        with contextlib.suppress(ValueError):           # of a bracket, or of a port that is no number
            parts = urllib.parse.urlsplit(self.url)
            valid = parts.hostname and "@" not in parts.netloc and parts.port != 0
        if not valid:
            raise UserError(f"{public(self.url)}: give a server's URL, without user and password; a key "
                            "belongs in the variable OPENAI_API_KEY")
        self.host, self.query = parts.netloc, parts.query
        self.path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.base = f"{parts.scheme}://{self.host}{self.path}"

    def ask(self, questions, done=()):
        """Yield (id, {"reply", "model", "finish"}) as the replies come; failures are skipped."""
        body = self.settings | {"model": self.model}
        body = {name: value for name, value in body.items() if value is not None}
        self.stop.clear()
        pool, failed = concurrent.futures.ThreadPoolExecutor(self.workers), 0
        try:
            futures = {pool.submit(self.one, q, body): q.id for q in questions if q.id not in done}
            for future in concurrent.futures.as_completed(futures):
                row, reason = future.result()
                if row:
                    failed = 0
                    yield futures[future], row
                    continue
                self.reason, failed = reason, failed + 1
                if failed == GIVE_UP:
                    self.reason = f"{failed} requests in a row failed and the rest was not asked; {reason}"
                    return
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    @functools.cached_property
    def model(self):
        """The model's name: as given, or the only one that the server lists. None: many servers need none."""
        if self.settings["model"]:
            return self.settings["model"]
        try:
            answer, _, _ = self.request("/models")
            names = [str(entry["id"]) for entry in answer["data"]]
        except (UserError, TypeError, KeyError):
            return None
        if len(names) > 1:
            raise UserError(f"{self.base} serves {len(names)} models ({', '.join(names[:5])}); say which one "
                            "is to reply")
        return names[0] if names else None

    def one(self, question, body):
        """-> (row, "") or (None, why the last of `attempts` attempts failed)."""
        images, reason = [], "not asked"
        for path in question.images:
            images.append({"type": "image_url", "image_url": {"url": data.image_url(path)}})
        body = {"messages": messages(question.text, images)} | body
        for attempt in range(1, self.attempts + 1):
            if self.stop.is_set():
                break
            answer, why, wait = self.request("/chat/completions", body)
            text, last = reply_of(answer), attempt == self.attempts or wait == math.inf
            if text is not None and (last or self.accept(text)):
                finish = answer["choices"][0].get("finish_reason")
                return {"reply": text, "model": answer.get("model"), "finish": finish}, ""
            reason = f"{why}, attempt {attempt} of {self.attempts}"
            if last or self.stop.wait(BACKOFF * 2 ** (attempt - 1) if wait is None else wait):
                break
        return None, reason

    def request(self, path, body=None):
        """A POST, or a GET without a body -> (the answer or None, the reason, seconds until another attempt).

        Seconds: None if the server does not say, inf if another attempt would not help. Raises
        UserError if the server refuses us.
        """
        start, answer = time.monotonic(), None
        try:
            status, headers, raw = self.exchange(path, body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            status, headers, raw = 0, {}, f"{self.base}: {error or type(error).__name__}".encode()
        if time.monotonic() - start >= self.timeout:
            return None, f"no answer within {self.timeout:g} seconds", None
        if len(raw) > LARGEST:
            return None, f"an answer of more than {LARGEST >> 20} MiB", math.inf
        said = self.hide(" ".join(raw.decode("utf-8", "replace").split()))[:200]
        if status < 300:
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(raw)
            return answer, f"no reply in {said!r}" if status else said, None
        reason = f"the server answered {status}: {said}"
        if status in (400, 413, 422):                   # about this one request: the others may succeed
            return None, reason, math.inf
        if status in (408, 425, 429) or status >= 500:
            after = headers.get("Retry-After", "")
            return None, reason, min(float(after), LONGEST_WAIT) if after.isdecimal() else None
        self.stop.set()                                 # the others would be refused as well
        raise UserError(f"{self.base}{path}: {reason}; check the URL, the model's name and the key in "
                        "OPENAI_API_KEY")

    def exchange(self, path, body):
        """-> (status, headers, body). Whatever the server sends ends, or fails, within the timeout."""
        end, headers = time.monotonic() + self.timeout, {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        target = f"{self.path}{path}?{self.query}".rstrip("?")
        secure = self.base.startswith("https")
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        with contextlib.closing(kind(self.host, timeout=self.timeout)) as connection:
            connection.connect()
            # the socket's own timeout starts anew with each byte
            timer = threading.Timer(end - time.monotonic(), _shut, [connection.sock])
            timer.start()
            try:
                connection.request("POST" if body else "GET", target, body and json.dumps(body), headers)
                response = connection.getresponse()
                return response.status, response.headers, response.read(LARGEST + 1)
            finally:
                timer.cancel()

    def hide(self, text):
        """A text for the screen: some servers repeat the key and the query that they were given."""
        for secret in filter(None, (self.key, self.query)):
            text = text.replace(secret, "***")
        return text


def _shut(sock):
    with contextlib.suppress(OSError):                  # the other end has shut it
        sock.shutdown(socket.SHUT_RDWR)


# ---- a folder ----
@dataclass
class Folder:
    """A model folder, loaded when it is first asked.

    batch: questions at once. device: "" for CUDA, else MPS, else the CPU. dtype: None for bfloat16 on CUDA,
    else float32. template: of a vision-language model's prompts, as vlm.load takes it.
    """
    source: str
    settings: dict
    batch: int = 8
    device: str = ""
    dtype: object = None
    template: str | None = None

    reason, accept = "", staticmethod(anything)

    def __post_init__(self):
        if not Path(self.source).is_dir() and self.source != "classroom":
            raise UserError(f"{self.source} is not a URL, a file of replies or a model folder; give one of "
                            "these")
        self.folder = data.model_folder(self.source)
        self.settings = self.settings | {"model": command.identity(self.folder)}
        self.sees = "vision_config" in data.read_json(self.folder / "config.json", {})

    def ask(self, questions, done=()):
        """Yield (id, {"reply", "finish"}).

        Batches are those of the whole list, so that a continued call draws the same tokens as the first:
        a batch that lacks a reply is computed again as a whole.
        """
        for at in range(0, len(questions), self.batch):
            batch, seed = questions[at:at + self.batch], None
            if all(q.id in done for q in batch):
                continue
            if self.settings["temperature"]:
                seed = data.hash64(self.settings["seed"], at) >> 1
            found = self.see(batch, seed) if self.sees else self.write(batch, seed)
            for question, (text, ended) in zip(batch, found, strict=True):
                if question.id not in done:
                    yield question.id, {"reply": text, "finish": "stop" if ended else "length"}

    @functools.cached_property
    def model(self):
        """vlm.load's of a vision-language model, else (tokenizer, model)."""
        import torch
        device = command.place(self.device)
        dtype = self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if not self.sees:
            return self.writer(device, dtype)
        from model import vlm
        try:
            return vlm.load(self.folder, dtype=dtype, device=device, template=self.template)
        except UserError as error:
            raise UserError(f"{error}; {SERVE}") from None

    def writer(self, device, dtype):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        fix = f"check it, {SERVE}"
        tokenizer = data.from_folder(AutoTokenizer, self.folder, "tokenizer", fix, padding_side="left")
        if not tokenizer.chat_template:
            raise UserError(f"{self.folder} has no chat template; give a model that was trained to chat")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = data.from_folder(AutoModelForCausalLM, self.folder, "chat model", fix, dtype=dtype)
        model.generation_config.do_sample = False       # unless a temperature is given
        return tokenizer, model.to(device).eval()

    def see(self, questions, seed):
        """[(reply, whether the model ended it by itself)] of a vision-language model; seed: to draw with."""
        from model import vlm
        images = [[data.read_image(path) for path in q.images] for q in questions]
        return vlm.complete(self.model, images, [q.text for q in questions], self.settings["max_tokens"],
                            self.batch, seed, self.settings["temperature"])

    def write(self, questions, seed):
        """`see`, of a language model."""
        import torch
        if any(q.images for q in questions):
            raise UserError(f"{self.folder} is a model for text and was asked about an image; give a LLaVA "
                            "folder or a server")
        tokenizer, model = self.model
        inputs = tokenizer.apply_chat_template(
            [messages(q.text) for q in questions], padding=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt").to(model.device)
        sampling, temperature = {}, self.settings["temperature"]
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed or 0)
            out = model.generate(**inputs, **sampling, max_new_tokens=self.settings["max_tokens"],
                                 pad_token_id=tokenizer.pad_token_id)
        new = out[:, inputs["input_ids"].shape[1]:].tolist()                              # (R, new tokens)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.strip(), tokenizer.eos_token_id in ids) for text, ids in zip(texts, new, strict=True)]
