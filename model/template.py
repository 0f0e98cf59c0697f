"""A chat template is a program that a model folder brings: it is tried before it is used.

    check(folder, tokenizer, template, messages)    raises UserError for one that fails, or takes too much

It is tried in a process of its own, which the system limits and which shares nothing with this one: a fork
would inherit the locks of torch's threads.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

import inspect
import json
import re
import subprocess
import sys
from functools import lru_cache

from data import UserError


def check(folder, tokenizer, template, messages):
    """Render the template of a folder once."""
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(template))             # transformers' own
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if why := _fault(json.dumps([plain, tokens | {"messages": messages, "add_generation_prompt": True}])):
        raise UserError(f"the chat template of {folder} fails, or takes too much: {why}; correct it")


@lru_cache(100)
def _fault(given):
    """Why a template cannot be rendered, else "". given: the template and its variables."""
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], input=given, capture_output=True, text=True)
    said = done.stderr.strip().rpartition("\n")[2]
    return done.returncode and (said or "it computes for seconds")


def _rendered():
    """That process's work, in transformers' words: two seconds, half a gigabyte, 100,000 characters."""
    import json
    import resource
    import sys
    from datetime import datetime

    from jinja2.sandbox import ImmutableSandboxedEnvironment
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
    if sys.platform == "linux":                         # others do not keep to it
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    template, variables = json.load(sys.stdin)
    here = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    here.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    here.globals |= {"strftime_now": lambda form: datetime.now().strftime(form), "raise_exception": sys.exit}
    try:
        length = len(here.from_string(template).render(variables))
    except Exception as error:
        sys.exit(f"{type(error).__name__}, {error}")
    if length > 100_000:
        sys.exit(f"it writes {length:,} characters for one word")


PROGRAM = f"{inspect.getsource(_rendered)}_rendered()"
