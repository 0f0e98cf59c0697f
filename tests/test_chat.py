"""ask.py: a server may fail as it likes; every reply is kept, every loss is counted, no reply is made up."""
import base64
import contextlib
import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT, picture, word_tokenizer, write_llava

import data
from model import ask


def requests(n=5, words="What is this?"):
    return [ask.Question(str(i), f"{words} {i}") for i in range(n)]


def replies(source, questions, out=None, attempts=4, timeout=60, **options):
    """Of each reply its text alone: {id: text}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask, "ATTEMPTS", attempts)
        patch.setattr(ask, "TIMEOUT", timeout)
        return {i: row["reply"] for i, row in ask.ask(source, questions, out, **options).items()}


def reply(text, finish="stop", **more):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text, **more},
                                         "finish_reason": finish}], "model": "judge-1"})


@contextlib.contextmanager
def server(respond):
    """A loopback server; respond(body, call number) -> (status, text[, headers]), None hangs up."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                calls.append((self.path, dict(self.headers), body))
                number = len(calls)
            self.answer(respond(body, number))

        def answer(self, said):
            if said is None:
                return self.connection.close()
            status, text, *headers = said
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    calls, lock = [], threading.Lock()
    class Patient(ThreadingHTTPServer):
        request_queue_size = 64

    http = Patient(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", calls
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def echo(body, number):
    return reply("reply to " + body["messages"][0]["content"].split()[-1])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ask, "BACKOFF", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_each_request_gets_its_own_reply_in_order_and_the_file_goes_on(tmp_path):
    out = tmp_path / "replies.jsonl"
    with server(echo) as (url, calls):
        said = replies(url, requests(20), out, max_tokens=7, temperature=0.5, seed=3)
        assert list(said.items()) == [(str(i), f"reply to {i}") for i in range(20)]
        path, _, body = calls[0]
        assert path == "/v1/chat/completions"
        assert {k: v for k, v in body.items() if k != "messages"} == {
            "max_tokens": 7, "temperature": 0.5, "seed": 3}
        out.write_bytes(out.read_bytes()[:-9])                                    # killed within a line
        assert replies(url, requests(20), out, max_tokens=7, temperature=0.5, seed=3) == said
        assert len(calls) == 21
        replies(url, requests(20, "Another prompt"), out, max_tokens=7, temperature=0.5, seed=3)
        assert len(calls) == 41                                                 # what was asked has changed
        replies(url, requests(20), out, max_tokens=8, temperature=0.5, seed=3)
        assert len(calls) == 61                                                         # and so do settings
    assert replies(url, requests(20), out, max_tokens=7, temperature=0.5, seed=3) == said   # no server
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0].keys() == {"id", "hash", "asked", "reply", "model", "finish"}


@pytest.mark.parametrize("given, path", [("", "/v1"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/api/v3", "/api/v3"),
                                         ("/v1/chat/completions", "/v1"), ("/v1?version=2", "/v1")])
def test_the_url_may_be_a_host_a_base_or_the_whole(given, path):
    with server(echo) as (url, calls):
        assert replies(url + given, requests(1), model="m") == {"0": "reply to 0"}
    assert calls[0][0].partition("?")[0] == f"{path}/chat/completions"
    assert calls[0][0].endswith("?version=2") == ("?" in given) and calls[0][2]["model"] == "m"


FAULTS = {"500": (500, "oops"), "503 html": (503, "<html>busy</html>"), "html": (200, "<html>login</html>"),
          "broken": (200, '{"choices": ['), "no text": (200, '{"choices": []}'), "a list": (200, "[1]"),
          "null": reply(None), "an error": (200, '{"error": "overloaded"}'), "hangs up": None,
          "no message": (200, '{"choices": [{"message": null}]}'), "a text": (200, '"choices"'),
          "choices null": (200, '{"choices": null}'), "a number": reply(7), "parts of none": reply([1, None]),
          "blank": reply(" \n"), "no part is text": reply([{"type": "thinking", "thinking": "hm"}]),
          "a refusal": reply(None, refusal="I can't."),
          "thoughts alone": reply(None, finish="length", reasoning_content="Rating: 2"),
          "429": (429, "slow down", {"Retry-After": "0"}), "408": (408, ""), "empty": (200, "")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried_and_then_counted(tmp_path, capsys, fault):
    """The first two calls fail: all is well in the end. Request 3 always fails: it is absent, and said."""
    with server(lambda body, n: FAULTS[fault] if n < 3 else echo(body, n)) as (url, calls):
        assert len(replies(url, requests(), attempts=3, workers=1)) == 5
        assert len(calls) == 7
    assert capsys.readouterr().err.count("got no reply") == 0
    def respond(body, n):
        return FAULTS[fault] if body["messages"][0]["content"][-1] == "3" else echo(body, n)
    out = tmp_path / "replies.jsonl"
    with server(respond) as (url, calls):
        assert sorted(replies(url, requests(), out, attempts=3)) == ["0", "1", "2", "4"]
        assert len(calls) == 4 + 3                                                        # and no more
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("asking: 1 of 5 requests got no reply (last: ") and "attempt 3 of 3" in said
    with server(echo) as (url, calls):
        assert len(replies(url, requests(), out)) == 5 and len(calls) == 1


NAMED = {"a refusal": reply(None, refusal="I can't help with that."), "an empty reply (stop)": reply(""),
         "an empty reply (length)": reply(None, "length", reasoning_content="a rating of 2, or"),
         "an empty reply (content_filter)": reply("", "content_filter"),
         "an error": (200, '{"error": {"message": "Rate limit reached", "code": 429}}'),
         "no choices": (200, '{"output": "4"}'),
         "a stream of events": (200, ': hello\n\ndata: {"choices": [{"delta": {"content": "4"}}]}\n\n'
                                     'data: [DONE]'),
         "the server answered 400": (400, '{"message": "This model\'s maximum context length is 2048"}')}


def test_what_is_no_reply_is_counted_under_its_own_name(tmp_path, capsys):
    kinds = list(NAMED)

    def respond(body, n):
        return NAMED[kinds[int(body["messages"][0]["content"].split()[-1]) % len(kinds)]]
    with server(respond) as (url, calls):
        assert replies(url, requests(2 * len(kinds)), tmp_path / "o", attempts=2, model="m") == {}
        assert len(calls) == 2 * 2 * len(kinds) - 2                              # a 400 is not tried again
    said = capsys.readouterr().err
    assert all(f"'{kind}': 2" in said for kind in kinds) and not (tmp_path / "o").exists()


def test_a_content_of_parts_is_their_text(capsys):
    parts = [{"type": "thinking", "thinking": "Rating: 2"}, {"type": "text", "text": "Rating:"},
             {"type": "text", "text": " 4"}]
    with server(lambda body, n: reply(parts)) as (url, calls):
        assert replies(url, requests(1)) == {"0": "Rating: 4"} and len(calls) == 1


@pytest.mark.parametrize("text", ["<think>\nA rating of 2 could", "My first impression is Rating: 2, but on"])
@pytest.mark.parametrize("finish", ["length", "content_filter"])
def test_a_reply_that_is_cut_off_is_asked_for_again_and_marked(tmp_path, capsys, text, finish):
    out = tmp_path / "replies.jsonl"
    with server(lambda body, n: reply(text, finish) if n < 3 else reply("Rating: 4")) as (url, calls):
        assert replies(url, requests(1), out) == {"0": "Rating: 4"} and len(calls) == 3
    with server(lambda body, n: reply(text, finish)) as (url, calls):
        row = ask.ask(url, requests(1, "Other"), out)["0"]
        assert len(calls) == ask.ATTEMPTS == 4 and not ask.whole(row) and row["reply"] == text
    assert "1 of 1 replies are cut off" in capsys.readouterr().err
    assert not ask.whole(ask.ask(out, requests(1, "Other"))["0"])                      # the file says so, too
    with server(echo) as (url, calls):
        assert replies(url, requests(1, "Other"), out) == {"0": "reply to 0"}
    with server(lambda body, n: reply(text, finish)) as (url, calls):                      # a responder's
        assert len(ask.ask(url, requests(1, "Other"), accept=bool)) == len(calls) == 1


def newer(body, n):
    """A server that takes neither max_tokens nor a temperature."""
    refused = [name for name in ("max_tokens", "temperature") if name in body]
    if refused:
        message = f"Unsupported parameter: '{refused[0]}' is not supported with this model."
        return 400, json.dumps({"error": {"message": message, "param": refused[0]}})
    return echo(body, n)


def test_settings_that_a_server_refuses_are_asked_otherwise(capsys):
    with server(newer) as (url, calls):
        said = replies(url, requests(40), max_tokens=7, model="m")
        assert len(said) == 40 and len(calls) <= 40 + 2 * 8         # each of 8 workers may learn it itself
        assert calls[-1][2].keys() == {"messages", "model", "max_completion_tokens"}
        assert calls[-1][2]["max_completion_tokens"] == 7
    assert "takes no temperature and was asked without one" in capsys.readouterr().err


def test_a_server_that_says_nothing_is_left_after_the_timeout(capsys):
    wait = threading.Event()
    with server(lambda body, n: (wait.wait(5), echo(body, n))[1]) as (url, _):
        assert replies(url, requests(2), timeout=0.1, attempts=2) == {}
        wait.set()
    assert "2 of 2 requests got no reply (last: no answer within 0.1 seconds" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_not_asked_for_ever(monkeypatch, capsys):
    with server(echo) as (url, _):
        pass
    monkeypatch.setattr(ask, "GIVE_UP", 3)
    assert replies(url, requests(1000), workers=2) == {}
    said = capsys.readouterr().err
    assert "1000 of 1000" in said and "3 requests in a row failed and the rest was not asked" in said
    assert "refused" in said


def test_retry_after_is_honoured_and_bounded(monkeypatch):
    waits, after = [], ["7", "86400", "9" * 5000, "-3", "nan", "soon"]

    class Noting(threading.Event):
        def wait(self, seconds=None):
            waits.append(seconds)
    monkeypatch.setattr(ask, "threading", SimpleNamespace(Event=Noting, Timer=threading.Timer))

    def respond(body, n):
        return (503, "", {"Retry-After": after[n - 1]}) if n <= len(after) else echo(body, n)
    with server(respond) as (url, _):
        assert replies(url, requests(1), model="m", attempts=9) == {"0": "reply to 0"}
    assert waits == [7, ask.LONGEST_WAIT, ask.LONGEST_WAIT, *(ask.BACKOFF * 2 ** n for n in (3, 4, 5))]


@contextlib.contextmanager
def raw_server(*pieces, pause=0.02):
    """A loopback socket that reads a request and sends pieces of bytes, the last one for ever."""
    def serve():
        while not over.is_set():
            with contextlib.suppress(OSError), listening.accept()[0] as client:
                client.recv(1 << 16)
                for piece in itertools.chain(pieces, itertools.repeat(pieces[-1])):
                    client.sendall(piece)
                    if over.wait(pause):
                        return
    over, listening = threading.Event(), socket.create_server(("127.0.0.1", 0))
    listening.settimeout(0.1)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        thread.join()
        listening.close()


START = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("pieces", [[b"H"], [b"HTTP/1.1 200 O", b"K"], [START, b"X: y\r\n"], [START, b"X"],
                                    [b"HTTP/1.1 100 Continue\r\n\r\n"],
                                    [START + b"Content-Length: 900000\r\n\r\n", b" "],
                                    [START + b"\r\n", b" "], [b"\0"],
                                    [START + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"]])
def test_a_server_that_drips_is_left_after_the_timeout(capsys, pieces):
    """Each byte comes before the socket's own timeout: the attempt as a whole has one."""
    start = time.monotonic()
    with raw_server(*pieces) as url:
        assert replies(url, requests(2), model="m", timeout=0.4, attempts=2, workers=1) == {}
    assert time.monotonic() - start < 2 * 2 * 0.4 + 1
    assert "2 of 2 requests got no reply (last: " in capsys.readouterr().err


def test_a_reply_without_end_is_not_kept_in_memory(monkeypatch, capsys):
    monkeypatch.setattr(ask, "LARGEST", 1 << 20)
    start = time.monotonic()
    with raw_server(START + b"\r\n", b"x" * (1 << 16), pause=0) as url:
        assert replies(url, requests(1), model="m", attempts=2) == {}
    assert time.monotonic() - start < 30                                         # long before both timeouts
    assert "no reply in 'xxx" in capsys.readouterr().err


def test_nobody_waits_at_the_end_for_requests_that_are_under_way(tmp_path):
    """One is refused, the others are never answered: the process ends at once, without a word of theirs."""
    asks = ("import sys; from model import ask\ntry: ask.ask(sys.argv[1], "
            "[ask.Question(str(i), str(i)) for i in range(8)], model='m')\n"
            "except ask.UserError as error: sys.exit(str(error))")
    wait = threading.Event()

    def respond(body, n):
        if n < 8:
            wait.wait(50)
        return 401, "who are you?"
    with server(respond) as (url, _):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", asks, url], cwd=ROOT, capture_output=True, text=True)
        seconds = time.monotonic() - start
        wait.set()
    assert done.returncode == 1 and "Traceback" not in done.stderr and "answered 401" in done.stderr
    assert seconds < 20


@pytest.mark.parametrize("url", ["HTTP://", "http://", "http://host:port/v1", "http://[::1", "https://:80/", "http:///v1",
                                 "HTTP://me:sec/ret@host",
                                 "http://me:secret@host", "http://me:secret@host:1/v1?key=secret"])
def test_what_is_no_servers_url_is_refused_at_once(url):
    with pytest.raises(data.UserError, match="give a server's URL, without user and password") as caught:
        ask.connect(url)
    assert not {"secret", "sec/ret"} & set(re.findall("sec/?ret", str(caught.value)))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_stops_at_once_with_a_sentence(status):
    headers = {"Location": "http://127.0.0.1:1/"}                     # never followed: the key would go along
    with server(lambda body, n: (status, '{"error": "no such model"}', headers)) as (url, calls):
        with pytest.raises(data.UserError, match=f"answered {status}: .*no such model.*; check the URL"):
            replies(url, requests(50), workers=1)
        assert len(calls) < 5                                      # the first, and what was under way


def test_a_request_that_the_server_cannot_take_is_not_tried_again(capsys):
    """A text longer than the model's context must not stop the others."""
    def respond(body, n):
        return (400, "too long") if body["messages"][0]["content"][-1] == "1" else echo(body, n)
    with server(respond) as (url, calls):
        assert len(replies(url, requests(3))) == 2 and len(calls) == 3
    assert "the server answered 400: too long" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_and_is_written_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret\n")
    out = tmp_path / "replies.jsonl"
    wrong = "wrong key sk-very-secret"
    with server(lambda body, n: echo(body, n) if n == 1 else (500, wrong)) as (url, calls):
        replies(url, requests(3), out, workers=1, attempts=1)
        assert calls[0][1]["Authorization"] == "Bearer sk-very-secret"
    with server(lambda body, n: (401, wrong)) as (url, _):
        with pytest.raises(data.UserError, match=r"wrong key \*\*\*"):
            replies(url, requests(1))
    with server(lambda body, n: (500, " " * 190 + wrong)) as (url, _):          # hidden, then shortened
        replies(f"{url}?api_key=hush", requests(1), attempts=1)
    with server(lambda body, n: (404, "no /v1/chat/completions?api_key=hush, hush is wrong")) as (url, calls):
        with pytest.raises(data.UserError) as caught:
            replies(f"{url}?api_key=hush&version=2", requests(1))
        assert calls[0][0].endswith("?api_key=hush&version=2")
    replies("http://127.0.0.1:1/v1?key=hush.jsonl", requests(1), attempts=1)         # a URL, and no file
    for source in ("ftp://me:hush@host/v1?hush", "//me:hush@host/v1?hush"):
        with pytest.raises(data.UserError, match="is not a URL") as refused:
            replies(source, requests(1))
        assert "hush" not in str(refused.value)
    said = "".join(capsys.readouterr()) + out.read_text() + str(caught.value)
    assert not {"secret", "sk-ve", "hush"} & set(re.findall("secret|sk-ve|hush", said))


@pytest.mark.parametrize("source, shown", [
    ("https://me:pw@host:8/v1?key=k#part", "https://host:8/v1"), ("http://host", "http://host"),
    ("http://host?key=k@b", "http://host"), ("http://host/a@b", "http://host/a@b"), ("a/b?c@d", "a/b?c@d")])
def test_of_a_url_only_what_is_no_secret_is_shown(source, shown):
    assert ask.public(source) == shown


def test_a_servers_model_is_named_only_if_it_is_given():
    with server(echo) as (url, calls):
        assert replies(url, requests(1)) == {"0": "reply to 0"} and "model" not in calls[-1][-1]
        replies(url, requests(1), model="b")
        assert calls[-1][-1]["model"] == "b"


def test_images_travel_as_data_urls_and_their_bytes_are_part_of_what_is_asked(tmp_path):
    path = tmp_path / "dog.png"

    def asked():
        return [ask.Question("0", "What is this?", [path])]
    with server(lambda body, n: reply(str(n))) as (url, calls):
        for n, (kind, mime) in enumerate([("png", "png"), ("jpeg", "jpeg"), ("bmp", "png")], 1):
            picture(0).save(path, kind)
            for _ in range(2):
                assert replies(url, asked(), tmp_path / "replies.jsonl") == {"0": str(n)}
            image, text = calls[-1][2]["messages"][0]["content"]
            head, _, code = image["image_url"]["url"].partition(",")
            assert head == f"data:image/{mime};base64" and text == {"type": "text", "text": "What is this?"}
            assert (base64.b64decode(code) == path.read_bytes()) == (kind != "bmp")
    path.unlink()
    with pytest.raises(data.UserError, match="dog.png could not be read"):
        replies(url, asked())


# ------------------------------------------------------------------------------------------ saved replies
SAVED = [[{"id": "0", "reply": "a"}, {"id": "1", "reply": "b"}],
         [{"question_id": 1, "judge_reply": "b"}, {"question_id": 0, "judge_reply": "a"}],
         [{"choices": [{"message": {"content": "a"}}]}, {"choices": [{"message": {"content": "b"}}]}],
         [{"id": "chatcmpl-9", "choices": [{"message": {"content": t}}]} for t in "ab"],
         [{"id": f"batch_{t}", "custom_id": i, "error": None, "response": {"status_code": 200, "body": {
             "choices": [{"message": {"content": t}}]}}} for i, t in ("1b", "0a")]]


@pytest.mark.parametrize("records", SAVED)
@pytest.mark.parametrize("as_list", [True, False])
def test_saved_replies_are_read_in_every_form(tmp_path, records, as_list):
    path = tmp_path / "saved.json"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(json.dumps(records, indent=1) if as_list else lines)
    assert replies(path, requests(2)) == {"0": "a", "1": "b"}


@pytest.mark.parametrize("text, says", [
    ('[{"reply": "a"}, {"reply": "b"}, {"reply": "c"}]', "record 1 of 3 has no id .*; only 2 can do without"),
    ('[{"id": "1", "reply": "a"}, {"reply": "b"}]', "id 1 has two different replies"),
    ('{"id": "0", "reply": "a"}\n{"id": "0", "reply": "b"}\n', "id 0 has two different replies"),
    ('{"id": "0", "reply": 7}\n', "record 1 of 1 has no id or no reply"),
    ('{"id": "0", "answer": "a"}\n', "record 1 of 1 has no id or no reply"),
    ('[{"id": "0", "reply": "a"}, 7]', "entry 2: int instead"),
    ("[{", "broken JSON"), ("{\n{}\n", "line 1: brok")])
def test_saved_replies_that_cannot_be_trusted_are_refused(tmp_path, text, says):
    (tmp_path / "saved.json").write_text(text)
    with pytest.raises(data.UserError, match=says):
        replies(tmp_path / "saved.json", requests(2))


def test_the_output_of_a_batch_is_read_with_what_failed_in_it(tmp_path, capsys):
    """Lines in any order; an error and a refusal count as missing, a reply that is cut off says so."""
    def line(name, message, finish="stop", **more):
        body = {"choices": [{"message": message, "finish_reason": finish}]}
        return {"id": "b", "custom_id": name, "response": {"status_code": 200, "body": body}} | more
    lines = [line("2", {"content": "c"}, "length"), line("0", {"content": "a"}),
             line("1", {}, response={"status_code": 429, "body": {"error": {"message": "slow"}}}),
             line("3", {"content": None, "refusal": "no"}), line("4", {}, response=None, error={"code": 1}),
             line("5", {}, response="text"), line("6", {}, response=None)]
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    rows = ask.ask(path, requests(7))
    assert {i: row["reply"] for i, row in rows.items()} == {"0": "a", "2": "c"}
    assert [ask.whole(row) for row in rows.values()] == [True, False]
    said = capsys.readouterr().err
    assert "5 of 7 requests got no reply" in said and "1 of 7 replies are cut off" in said


def test_saved_replies_that_are_missing_are_counted(tmp_path, capsys):
    (tmp_path / "saved.jsonl").write_text('{"id": "1", "reply": "b"}\n{"id": "0", "reply": "a')      # torn
    assert replies(tmp_path / "saved.jsonl", requests(2)) == {"1": "b"}
    assert "1 of 2 requests got no reply" in capsys.readouterr().err
    with pytest.raises(data.UserError, match="none.jsonl could not be read"):
        replies(tmp_path / "none.jsonl", requests(2))


def test_replies_to_something_else_are_refused(tmp_path):
    """What a judge said about other answers would be a wrong number."""
    out = tmp_path / "replies.jsonl"
    with server(echo) as (url, _):
        said = replies(url, requests(3), out)
        assert replies(out, requests(3)) == said
        with pytest.raises(data.UserError, match=r"replies to other requests \(3 ids, first 0\)"):
            replies(out, requests(3, "Another prompt"))
        again = replies(url, requests(3, "Another prompt"), out)
        assert replies(out, requests(3, "Another prompt")) == again


# ------------------------------------------------------------------------------------------ local models
@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A chat model for text with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, tokenizer = tmp_path_factory.mktemp("talker"), word_tokenizer()
    tokenizer.chat_template = ("<s> {% for m in messages %}USER: {{ m['content'] }} {% endfor %}"
                               "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=len(tokenizer), initializer_range=0.5,
                         eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def local_requests(n, image=None):
    words = ["a red dog", "what is this ?", "two", "is there a cat and a dog ?", "one blue cat"]

    return [ask.Question(str(i), words[i % 5], [image] if image else ()) for i in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sees", [False, True])
def test_a_local_model_replies_and_goes_on_with_the_same_draws(talker, tmp_path, temperature, sees):
    folder, image = talker, None
    if sees:
        folder, image = write_llava(tmp_path / "model"), tmp_path / "dog.png"
        picture(0).save(image)
    asked, out, whole = local_requests(11, image), tmp_path / "replies.jsonl", tmp_path / "whole.jsonl"
    options = {"max_tokens": 5, "temperature": temperature, "seed": 1}
    said = replies(folder, asked, whole, **options)
    assert len(said) == 11 and len(set(said.values())) > 1
    out.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:9]))
    assert replies(folder, asked, out, **options) == said
    assert out.read_bytes() == whole.read_bytes()
    alone = replies(folder, asked[:1], max_tokens=5)
    assert temperature or alone["0"] == said["0"]                         # a batch changes nothing


def test_another_model_of_the_same_name_is_asked_anew(talker, tmp_path):
    copy, asked, out = tmp_path / "talker", local_requests(3), tmp_path / "replies.jsonl"
    shutil.copytree(talker, copy)
    replies(copy, asked, out, max_tokens=2)
    replies(copy, asked, out, max_tokens=2)
    assert len(out.read_text().splitlines()) == 3
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    replies(copy, asked, out, max_tokens=2)
    assert len(out.read_text().splitlines()) == 6


def test_what_is_no_source_is_refused(talker, tmp_path):
    with pytest.raises(data.UserError, match="gpt-4o is not a URL, a file of replies or a model folder"):
        replies("gpt-4o", requests(1))
    picture(0).save(tmp_path / "dog.png")
    with pytest.raises(data.UserError, match="the template 'of a text model' makes 0 image places for 1"):
        replies(talker, local_requests(1, tmp_path / "dog.png"))
    for config in ("{}", '{"model_type": "qwen2_vl", "vision_config": {}}'):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(data.UserError, match="or serve it, with vLLM for example, and give its URL"):
            replies(tmp_path, requests(1))


def test_importing_chat_loads_no_model_code():
    code = "import sys, model.ask; print({'torch', 'transformers', 'model.vlm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"
