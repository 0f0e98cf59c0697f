"""Ask a chat model many things and lose no reply: a server by URL, a local folder, or replies saved before.

    asked = [{"id": "7", "messages": [{"role": "user", "content": "What does this text name? ..."}]}]
    said = replies("http://localhost:8000/v1", asked, out="replies.jsonl")            # {"7": "..."}
    said = replies("https://api.openai.com/v1", asked, "replies.jsonl", model="gpt-4o")
    said = replies("qwen2.5-7b-instruct", asked, "replies.jsonl")                     # a folder, loaded here
    said = replies("replies.jsonl", asked)                                            # what was said before

Judges and extractors of eval_hallu.py and the writers of synth.py ask through this one function: a file of
its own, because both need it and neither may import the other. A server's key is read from OPENAI_API_KEY and
written nowhere. No torch is imported until a local model is asked.

What was said is appended to `out` as it comes; the same call asks only for what is missing. A request that
the server fails is tried again, a bounded number of times, then counted and left out: no reply is made up.
"""
import base64
import concurrent.futures
import contextlib
import email.utils
import hashlib
import http.client
import io
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

import data

BACKOFF = 0.5           # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 60.0     # seconds: a server's Retry-After beyond this is cut to it
GIVE_UP = 24            # requests that failed in a row: the server is down, the rest is not asked
LARGEST = 1 << 24       # bytes of a reply
BATCH = 8               # requests at once in a local model


class Failed(Exception):
    """One request without a usable reply; `again` says whether another attempt may help, `wait` how soon."""
    def __init__(self, reason, again=True, wait=None):
        super().__init__(reason)
        self.again, self.wait = again, wait


def replies(source, requests, out=None, *, model=None, max_tokens=512, temperature=0.0, seed=None, timeout=60,
            attempts=4, workers=8, accept=None, description="asking"):
    """-> {id: reply} in the order of the requests; what got no reply is absent, counted and said on stderr.

    source: an http(s) URL of an OpenAI-compatible server, a file of saved replies (see `saved`), or a model
    folder. requests: [{"id": str, "messages": [{"role", "content": text or a list of {"type": "text", "text"}
    and {"type": "image", "path"}}]}]. out: JSON lines {"id", "hash", "asked", "reply"}, to go on from.
    model: the server's name for it; None where it serves one. timeout: seconds of one attempt, all of it.
    accept: reply -> bool; a server is asked again for a reply that it turns down, and so is a later call. The
    last attempt's is kept all the same: what cannot be read is for the caller to count.
    Raises UserError for a wrong source, and at once where the server refuses us (401, 403, 404 ...).
    """
    source, asked = str(source), {r["id"]: digest(r["messages"]) for r in requests}
    if len(asked) < len(requests):
        raise data.UserError(f"{description}: {len(requests) - len(asked)} of {len(requests)} requests "
                             "repeat an id; give each an id of its own")
    url, file = source.startswith(("http://", "https://")), Path(source).is_file()
    if file or source.endswith((".jsonl", ".json")):
        said, reason = saved(source, asked), f"{source} does not hold it"
        again = ""
    else:
        settings = {"model": model if url else weights_of(source), "max_tokens": max_tokens,
                    "temperature": temperature, "seed": seed}
        keys = {i: digest([key, settings]) for i, key in asked.items()}
        said, server = resumed(out, keys), Server(
            source, settings, timeout, attempts, accept) if url else None
        missing = [r for r in requests if r["id"] not in said or url and accept and not accept(said[r["id"]])]
        if missing:
            found = server.ask(missing, workers) if url else ask_local(source, requests, set(said), settings)
            with (contextlib.closing(found), tqdm(total=len(asked), initial=len(asked) - len(missing),
                                                  desc=description, unit="reply", disable=None) as bar):
                for i, text, more in found:
                    said[i] = text
                    if out:
                        line = {"id": i, "hash": keys[i], "asked": asked[i], "reply": text, **more}
                        data.append_jsonl(str(out), line)
                    bar.update()
        reason, again = server.reason if url else "", "; the same command asks only for them"
    if lost := sum(i not in said for i in asked):
        print(f"{description}: {lost} of {len(asked)} requests got no reply (last: {reason}){again}",
              file=sys.stderr)
    return {i: said[i] for i in asked if i in said}


def digest(messages):
    """16 hex digits over what is asked: the texts, and the bytes of the images rather than their paths."""
    def stable(part):
        if isinstance(part, dict) and part.get("type") == "image":
            return {"image": hashlib.sha256(_bytes(part["path"])).hexdigest()}
        if isinstance(part, list):
            return [stable(inner) for inner in part]
        return {key: stable(inner) for key, inner in part.items()} if isinstance(part, dict) else part
    return hashlib.sha256(json.dumps(stable(messages), sort_keys=True).encode()).hexdigest()[:16]


def weights_of(folder):
    """16 hex digits that tell one local model from another: each weights file's size, and blocks of it."""
    found = hashlib.sha256(str(Path(folder).name).encode())
    for path in sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            found.update(f"{path.name} {size}".encode())
            for block in range(16):
                file.seek(size * block // 16)
                found.update(file.read(1 << 14))
    return found.hexdigest()[:16]


def _bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise data.UserError(f"image {path} could not be read ({error.strerror}); check the path") from error


# ---------------------------------------------------------------------------------------------- files
def resumed(out, keys):
    """{id: reply} of what `out` already holds to exactly these requests."""
    said = {}
    for line in data.read_jsonl(out, torn_ok=True) if out and os.path.exists(out) else ():
        if not (isinstance(line.get("id"), str) and "hash" in line and isinstance(line.get("reply"), str)):
            raise data.UserError(f"{out} is no file of replies (a line lacks id, hash or reply); "
                                 "give another")
        if keys.get(line["id"]) == line["hash"]:
            said[line["id"]] = line["reply"]
    return said


def saved(path, asked):
    """{id: reply} of a file of saved replies: JSON lines or a list, in any of these forms.

    {"id" or "question_id", "reply" or "judge_reply" or "text" or "content"}, or a server's whole answer
    (`choices`). Where no line has an id, the replies are the requests' in order, and as many. What `replies`
    wrote names what was asked, and is refused where something else is asked now.
    """
    lines, said, other = read_records(path), {}, set()
    texts = [_text(line) for line in lines]
    names = [line.get("id", line.get("question_id")) if "choices" not in line else None for line in lines]
    if bad := [n for n, text in enumerate(texts, 1) if not isinstance(text, str)]:
        raise data.UserError(f"{path}: {len(bad)} records hold no reply (first: number {bad[0]}); each needs "
                             "`reply`, `judge_reply`, `text`, `content` or `choices`")
    if lines and not any(name is not None for name in names):
        if len(lines) != len(asked):
            raise data.UserError(f"{path} holds {len(lines)} replies without ids to {len(asked)} requests; "
                                 "they cannot be told apart, so add an `id` to each")
        return dict(zip(asked, texts, strict=True))
    for name, text, line in zip(names, texts, lines, strict=True):
        name = str(name)
        if "asked" in line and line["asked"] != asked.get(name):
            other.add(name)                             # perhaps an older line, which a later one replaces
        elif "asked" not in line and said.get(name, text) != text:
            raise data.UserError(f"{path}: id {name} has two different replies; keep one of them")
        else:
            said[name] = text
    if wrong := sorted(other & set(asked) - set(said)):
        raise data.UserError(f"{path} replies to other requests ({len(wrong)} ids, first {wrong[0]}): the "
                             "answers or the prompt have changed since; ask again")
    return said


def read_records(path, torn_ok=True):
    """The objects of a JSON list or of JSON lines, told apart by the first character. A last line that a
    killed run left unfinished is passed over: what it held is missing, and missing things are counted."""
    try:
        with open(path, "rb") as file:
            start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            file.seek(0)
            whole = file.read() if start == b"[" else b""
    except OSError as error:
        raise data.UserError(f"{path} could not be read ({error.strerror}); check the path") from error
    if start != b"[":
        return list(data.read_jsonl(path, torn_ok))
    try:
        records = json.loads(whole.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise data.UserError(f"{path}: broken JSON ({error}); mend the file") from error
    if bad := next((n for n, record in enumerate(records, 1) if not isinstance(record, dict)), None):
        raise data.UserError(f"{path}: entry {bad} is {type(records[bad - 1]).__name__} instead of a record "
                             "{...}; mend or delete it")
    return records


def _text(record):
    """The reply in a saved record or a server's answer; None where there is none."""
    try:
        return record["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return next((record[k] for k in ("reply", "judge_reply", "text", "content") if k in record), None)


# ---------------------------------------------------------------------------------------------- a server
class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to wherever a server points."""
    def redirect_request(self, *args):
        return None


class Server:
    """An OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, OpenAI itself."""

    def __init__(self, url, settings, timeout, attempts, accept=None):
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname or parts.username is not None:
            raise data.UserError(f"{parts.scheme}://{parts.hostname or ''}: give a server's URL, without "
                                 "user and password; a key belongs into the variable OPENAI_API_KEY")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.base, self.query = f"{parts.scheme}://{parts.netloc}{path}", parts.query
        self.settings, self.timeout, self.attempts = settings, timeout, attempts
        self.accept = accept or (lambda text: True)
        self.key, self.model = os.environ.get("OPENAI_API_KEY", "").strip(), settings["model"]
        self.reason = ""                                                  # of the last failure
        self.stop = threading.Event()
        local = parts.hostname in ("localhost", "::1") or parts.hostname.startswith("127.")
        proxies = [urllib.request.ProxyHandler({})] if local else []      # no proxy stands before one's own
        self.opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def ask(self, requests, workers):
        """Yield (id, reply, what else is worth keeping) as the replies come; remember the last failure."""
        if self.model is None:
            self.model = self.only_model()
        row, pool = 0, concurrent.futures.ThreadPoolExecutor(workers)
        try:
            futures = {pool.submit(self.one, request["messages"]): request["id"] for request in requests}
            for future in concurrent.futures.as_completed(futures):
                try:
                    text, more = future.result()
                except Failed as error:
                    self.reason, row = str(error), row + 1
                    if row >= GIVE_UP:
                        self.reason = f"{row} requests in a row failed and the rest was not asked; {error}"
                        return
                else:
                    row = 0
                    yield futures[future], text, more
        finally:
            self.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def only_model(self):
        """The name of the model where the server lists exactly one; many servers list none, and need none."""
        try:
            listed = self.call("/models", None, min(self.timeout, 10)).get("data")
            names = [entry["id"] for entry in listed]
        except (Failed, data.UserError, TypeError, KeyError):
            return None
        if len(names) > 1:
            raise data.UserError(f"{self.base} serves {len(names)} models ({', '.join(map(str, names[:5]))}"
                                 f"{' ...' * (len(names) > 5)}); say which one is to reply")
        return names[0] if names else None

    def one(self, messages):
        """A reply, after `attempts` attempts at most. Raises Failed with the last reason."""
        body = {"messages": [{**m, "content": _parts(m["content"])} for m in messages],
                **{key: value for key, value in {**self.settings, "model": self.model}.items()
                   if value is not None}}
        for attempt in range(1, self.attempts + 1):
            try:
                if self.stop.is_set():
                    raise Failed("not asked")
                answer = self.call("/chat/completions", body, self.timeout)
                if not isinstance(text := _text(answer), str):
                    raise Failed(f"no text in the answer {json.dumps(answer)[:100]}")
                more = {"model": answer.get("model", self.model),
                        "finish": answer["choices"][0].get("finish_reason")}
                if attempt == self.attempts or self.accept(text) or self.stop.wait(BACKOFF):
                    return text, {key: value for key, value in more.items() if isinstance(value, str)}
            except data.UserError:                          # a refusal: the others would be refused as well
                self.stop.set()
                raise
            except Failed as error:
                wait = BACKOFF * 2 ** (attempt - 1) if error.wait is None else error.wait
                if not error.again or attempt == self.attempts or self.stop.wait(min(wait, LONGEST_WAIT)):
                    raise Failed(f"{self.hide(error)}, attempt {attempt} of {self.attempts}") from None

    def call(self, path, body, timeout):
        """POST (or GET, without a body) -> the JSON object. Raises Failed, or UserError for a refusal."""
        url = f"{self.base}{path}" + (f"?{self.query}" if self.query else "")
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
        end, raw = time.monotonic() + timeout, bytearray()
        try:
            with self.opener.open(request, timeout=timeout) as response:
                while piece := response.read1(1 << 16):
                    raw += piece
                    if time.monotonic() > end:
                        raise TimeoutError
                    if len(raw) > LARGEST:
                        raise Failed(f"an answer of more than {LARGEST >> 20} MiB", again=False)
        except urllib.error.HTTPError as error:
            with error:
                said = self.hide(" ".join(_head(error).split())[:200])
            reason = f"the server answered {error.code}: {said or error.reason}"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise Failed(reason, wait=_retry_after(error.headers)) from None
            if error.code in (400, 413, 422):                   # about this one request: the others may do
                raise Failed(reason, again=False) from None
            raise data.UserError(f"{self.base}{path}: {reason}; check the URL, the model's name and the "
                                 "key in OPENAI_API_KEY") from None
        except TimeoutError:
            raise Failed(f"no answer within {timeout:g} seconds") from None
        except (OSError, http.client.HTTPException, ValueError) as error:     # URLError is an OSError
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise Failed(f"no answer within {timeout:g} seconds") from None
            raise Failed(self.hide(f"{self.base}: {cause or type(cause).__name__}")) from None
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            start = " ".join(bytes(raw[:80]).decode("utf-8", "replace").split())
            raise Failed(self.hide(f"the answer is no JSON object but {start!r}"))
        return answer

    def hide(self, text):
        """A text for the screen: some servers repeat the key that they were given."""
        return str(text).replace(self.key, "***") if self.key else str(text)


def _head(error):
    """The start of what a server says about an error; reading it may fail as well."""
    try:
        return error.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(headers):
    """Seconds until the server wants to be asked again: a number or a date. None where it does not say."""
    value = headers.get("Retry-After") if headers else None
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        with contextlib.suppress(TypeError, ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        return None


def _parts(content):
    """Content as servers take it: an image is a data: URL."""
    if isinstance(content, str):
        return content
    return [{"type": "image_url", "image_url": {"url": data_url(part["path"])}} if part["type"] == "image"
            else part for part in content]


def data_url(path):
    """An image file as a data: URL: JPEG and PNG as they are, what a server may not read as PNG."""
    raw = _bytes(path)
    kind = "jpeg" if raw.startswith(b"\xff\xd8\xff") else "png"
    if kind == "png" and not raw.startswith(b"\x89PNG"):
        buffer = io.BytesIO()
        data.read_image(raw).save(buffer, kind)
        raw = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


# ---------------------------------------------------------------------------------------------- a folder
def ask_local(folder, requests, done, settings):
    """Yield (id, reply, {}) of a model folder. Batches are those of the whole list, so that a call that goes
    on draws what the first one would have: a batch that lacks a reply is computed again as a whole."""
    generate = local_model(folder, settings)
    for at in range(0, len(requests), BATCH):
        batch = requests[at:at + BATCH]
        if done.issuperset(r["id"] for r in batch):
            continue
        seed = data.hash64(settings["seed"], at) >> 1 if settings["temperature"] else None
        for request, text in zip(batch, generate([r["messages"] for r in batch], seed), strict=True):
            if request["id"] not in done:
                yield request["id"], text, {}


def local_model(folder, settings):
    """-> f(list of messages, a sampling seed or None) -> texts: a LLaVA folder, or a chat model for text."""
    if not Path(folder).is_dir() and folder != "classroom":
        raise data.UserError(f"{folder} is no URL, no file of replies and no model folder; give one of these")
    import torch

    import vlm
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    folder, sampling = data.model_folder(folder), {}
    if settings["temperature"]:
        sampling["temperature"] = settings["temperature"]
    if '"vision_config"' in _bytes(folder / "config.json").decode("utf-8", "replace"):
        m = vlm.load(folder, dtype=dtype, device=device)

        def look(batch, seed):
            images, texts = zip(*map(_one_turn, batch), strict=True)
            return vlm.generate(m, images, texts, max_new_tokens=settings["max_tokens"],
                                batch_size=len(batch), sample_seed=seed, **sampling)
        return look
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise data.UserError(f"{folder} cannot be loaded as a chat model ({reason}); check it") from None
    if not tokenizer.chat_template:
        raise data.UserError(f"{folder} has no chat template; give a model that was trained to chat")
    model, pad = model.to(device).eval(), tokenizer.pad_token or tokenizer.eos_token
    tokenizer.pad_token = pad
    sampling |= {"do_sample": True, "top_k": 0, "top_p": 1.0} if sampling else {"do_sample": False}

    @torch.no_grad()
    def write(batch, seed):
        turns = [[{"role": t["role"], "content": _text_only(t["content"])} for t in turns] for turns in batch]
        texts = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.random.fork_rng(devices=[model.device] if device == "cuda" else []):
            torch.manual_seed(seed or 0)
            out = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **sampling,
                                 max_new_tokens=settings["max_tokens"],
                                 pad_token_id=tokenizer.pad_token_id)                     # (R, T + new)
        new = out[:, inputs.input_ids.shape[1]:]
        return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return write


def _one_turn(messages):
    """-> (PIL images, text) of what a LLaVA model can be asked: one user turn, system text before it."""
    if [m["role"] for m in messages if m["role"] != "system"] != ["user"]:
        raise data.UserError("a local vision-language model takes one user message, and a system message "
                             "before it; use a server for conversations")
    parts = [part for m in messages for part in _as_parts(m["content"])]
    return ([data.read_image(part["path"]) for part in parts if part["type"] == "image"],
            "\n".join(part["text"] for part in parts if part["type"] == "text"))


def _text_only(content):
    if any(part["type"] != "text" for part in _as_parts(content)):
        raise data.UserError("a chat model for text was asked about an image; give a LLaVA folder "
                             "or a server")
    return "\n".join(part["text"] for part in _as_parts(content))


def _as_parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
