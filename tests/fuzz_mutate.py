"""How tests/fuzz.py spoils an input: bytes, JSON, safetensors, texts, chat templates, values of options.

Every function takes a random.Random first; the same state gives the same result. `neutral` changes how a file
is written and nothing of what it says.
"""
import copy
import json
import struct

LONG = "x" * 100_000
DEEP = "[" * 5_000 + "]" * 5_000
VALUES = [None, True, False, -1, 0, 1, 2 ** 63, 10 ** 400, 1e30, -1e308, float("nan"), float("inf"), "", " ",
          "\0", "\ud800", "a\nb", LONG, "../../../escape", "/../escape", "<image>", "</s>", "nan", "1e30",
          "<b>", [], {}, [[]], {"": None}, [None], ["a", 1], {"a": {"b": []}}, "💥", "-",
          "http://127.0.0.1:9/x"]
OPTIONS = ["nan", "inf", "-inf", "1e30", "-1e30", "-1", "0", "-0", "1", "2", "0.5", "1e-300", "5", "true", "",
           " ", "\0", "a\0b", "x" * 300, "x" * 5_000, "a/" * 3_000, "../../../escape", "banana", "1,2", ",",
           "nan,inf", str(2 ** 63), f"-{2 ** 64}", "1" * 5_000, "١", "1_0", "[", "{}", "{question}", "\ud800",
           "{{ 1 / 0 }}", "http://[", "http://127.0.0.1:9/v1", "cuda:99", "$(touch escape)",
           "; touch escape", "%s%n", "None", "\u202e", "/dev/null", "/dev/zero", ".", "/"]
JINJA = ["{{ 1 / 0 }}", "{{ nothing.at_all }}", "{{", "{% if %}", "{% raw %}", "{{ raise_exception('no') }}",
         "{{ messages[99]['role'] }}", "{{ messages }}", "{% include 'x' %}", "\0", "<image>",
         "{{ messages | map(attribute='x') | join }}", "{{ ''.__class__.__mro__ }}", "{{ x | nope }}",
         "{{ cycler.__init__.__globals__ }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
         "{{ messages | tojson }}"]
HEAVY = ["{% for i in range(99999999) %}x{% endfor %}", "{{ 'x' * 999999999 }}", "{{ 9 ** 9 ** 9 }}",
         "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}",
         "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}"]


# ---- bytes ----
def raw(rng, content):
    """A file as a bad disk, a full one or another program leaves it."""
    how = rng.randrange(10)
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    if how < 3:
        return flipped(rng, content, rng.choice((1, 1, 2, 16)))
    if how == 3:
        return content[:at]                                                    # torn
    if how == 4:
        return content[:at] + bytes(len(content) - at)                         # a tail that was not written
    if how == 5:
        others = b"", bytes(len(content)), b"\n", b"{}", b"[]", b"null", b"\xff\xfe", DEEP.encode()
        return rng.choice(others)
    if how == 6:
        return content[:at] + content[end:]                                    # a hole
    if how == 7:
        return content[:at] + rng.randbytes(rng.choice((1, 4, 300))) + content[at:]
    if how == 8:
        return content[:at] + bytes(end - at) + content[end:]
    return content + rng.choice((content[at:end], b"\0", rng.randbytes(9), b"\n{"))


def flipped(rng, content, n=1):
    """Some bits of it flipped."""
    found = bytearray(content)
    for _ in range(n if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


# ---- JSON ----
def places(tree):
    """(container, key) of everything in a tree of lists and dicts."""
    found = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            found += places(tree[key])
    return found


def spoil(rng, tree):
    """Change one place in a tree, in place."""
    found = places(tree)
    if not found:
        return
    (box, key), (other, there) = rng.choice(found), rng.choice(found)
    how = rng.randrange(10)
    if how < 5:
        box[key] = copy.deepcopy(rng.choice(VALUES))            # which may be spoiled in their turn
    elif how == 5:
        del box[key]
    elif how == 6 and isinstance(box, dict):
        box[rng.choice(("", "x", "\0", key.upper(), f"{key} "))] = box.pop(key)
    elif how == 7:
        box[key] = json.loads(json.dumps(other[there]))                         # another place's value
    elif how == 8:
        box[key] = [box[key]] if rng.random() < .5 else {"value": box[key]}
    elif isinstance(box, list):
        box.insert(rng.randrange(len(box) + 1), json.loads(json.dumps(box[key])))
    else:
        box[key] = str(box[key])


def parsed(content):
    """(the values of a file, whether they are JSON lines)."""
    try:
        return json.loads(content), False
    except ValueError:
        return [json.loads(line) for line in content.splitlines() if line.strip()], True


def written(tree, lines, **options):
    if not lines:
        return json.dumps(tree, **options).encode()
    return "".join(json.dumps(row, **options) + "\n" for row in tree).encode()


def a_json(rng, content):
    """A JSON file, or JSON lines, with a few places changed, or its bytes."""
    if rng.random() < .25:
        return raw(rng, content)
    tree, lines = parsed(content)
    if lines and rng.random() < .15:
        rng.shuffle(tree)
    box = [tree]                                                                # the whole may change, too
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        spoil(rng, box if rng.random() < .03 else tree)
        if not box or not isinstance(box[0], dict | list):
            break
        tree = box[0]
    whole = box[0] if box else None
    return written(whole, lines and isinstance(whole, list))


def reordered(rng, value):
    """The same value, the keys of its objects in another order."""
    if isinstance(value, list):
        return [reordered(rng, item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    rng.shuffle(keys)
    return {key: reordered(rng, value[key]) for key in keys}


def neutral(rng, content, order=True):
    """The same JSON, written otherwise: order of keys, blanks, escapes, line ends."""
    tree, lines = parsed(content)
    options = {"ensure_ascii": rng.random() < .5, "separators": rng.choice(((",", ":"), (" , ", " : ")))}
    if not lines:
        options["indent"] = rng.choice((None, 1, "\t"))
    found = written(reordered(rng, tree) if order else tree, lines, **options)
    if lines:
        return found.replace(b"\n", rng.choice((b"\n", b"\r\n", b"\n\n", b"  \n")))
    return found + b"\n"


# ---- safetensors ----
def a_safetensors(rng, content):
    """A safetensors file: its bytes, its header, or the length of the header."""
    size, = struct.unpack("<Q", content[:8])
    header, body = content[8:8 + size], content[8 + size:]
    how = rng.randrange(6)
    if how < 2:
        return raw(rng, content)
    if how == 2:
        length = rng.choice((0, 1, size - 1, size + 8, 2 ** 31, 2 ** 63, len(content)))
        return struct.pack("<Q", length) + content[8:]
    if how == 3:
        return content[:8 + size] + flipped(rng, body, rng.choice((1, 1, 50)))
    if how == 4:
        return content[:8 + size] + raw(rng, body)
    header = a_json(rng, header)
    return struct.pack("<Q", len(header)) + header + body


# ---- texts ----
def a_text(rng, content):
    """A text: its bytes, its lines, or characters that few texts have."""
    if rng.random() < .4:
        return raw(rng, content)
    lines = content.decode().split("\n")
    how = rng.randrange(4)
    at = rng.randrange(len(lines))
    if how == 0:
        rng.shuffle(lines)
    elif how == 1:
        lines[at] = rng.choice(("", LONG, "\0", "{", "{}", "{x}", "{0}", "%s", "<image>", "\u202e", "…" * 50))
    elif how == 2:
        lines[at:at] = [lines[at]] * rng.choice((1, 200))
    else:
        del lines[at]
    return "\n".join(lines).encode()


def a_template(rng, content):
    """A chat template: a fragment put in, characters lost, or its bytes."""
    text = content.decode()
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    how = rng.randrange(5)
    fragment = rng.choice(HEAVY if rng.random() < .03 else JINJA)
    if how < 2:
        return (text[:at] + fragment + text[at:]).encode()
    if how == 2:
        return (text + fragment).encode()
    if how == 3:
        return (text[:at] + text[min(end, at + 9):]).encode()
    return raw(rng, content)


# ---- what a server sends ----
def a_reply(rng, body):
    """The bytes of an HTTP answer: status, headers or body spoiled."""
    body = a_json(rng, body) if rng.random() < .6 else body
    status = rng.choice(["200 OK"] * 6 + ["500 No", "404 No", "302 Found", "999 \xff", "abc", "", "100 Go"])
    headers = [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    if rng.random() < .3:
        headers[0] = rng.choice(("Content-Length: -1", "Content-Length: 99999999999", "Content-Length: x",
                                 "Transfer-Encoding: chunked", "Location: http://127.0.0.1:9/", "X" * 70_000,
                                 "Content-Encoding: gzip", "\0: \0"))
    if rng.random() < .1:
        headers += [rng.choice(("Retry-After: nan", "Retry-After: -5", "Retry-After: 0", "Retry-After: ²"))]
    found = "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1") + body
    return raw(rng, found) if rng.random() < .15 else found
