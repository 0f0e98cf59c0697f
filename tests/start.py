"""Start commands as people do, each in a fork of one process, so that an import's cost is paid once.

    python tests/start.py [MODULE ...] < [[folder, [words]], ...] > [{code, out, err, loaded, seconds}, ...]

JSON on both sides. The modules are imported before the first fork. loaded: the modules that a command has
imported, by their names; seconds: of the processor, from the fork on, and for the modules before it (torch's
apart).
"""
import importlib
import json
import os
import runpy
import sys
import tempfile
import time
import traceback


def code_of(words):
    """Run the words of a command line in this process, as `python WORDS`. Returns the exit code."""
    sys.argv = [*words]
    try:
        if words[0] == "-m":
            sys.path[0] = os.getcwd()
            name = sys.argv.pop(1)
            sys.modules.pop(name, None)                  # or runpy warns of one that is there
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(words[0])
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def imported(names):
    """Import the modules -> the processor's seconds that it took, without torch's."""
    seconds = 0
    for name in names:
        began = time.process_time()
        importlib.import_module(name)
        if name != "torch":
            seconds += time.process_time() - began
    return seconds


def child(folder, words, out, err, told):
    """A fork's life: its output goes to the files, {code, loaded, seconds} to `told`."""
    began = time.process_time()
    os.chdir(folder)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    code = code_of(words)
    sys.stdout.flush()
    sys.stderr.flush()
    seconds = time.process_time() - began
    told.write(json.dumps({"code": code, "loaded": sorted(sys.modules), "seconds": seconds}))
    told.flush()
    os._exit(0)


def start(folder, words):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, \
            tempfile.TemporaryFile("w+") as told:
        process = os.fork()
        if process == 0:
            child(folder, words, out, err, told)
        os.waitpid(process, 0)
        texts = []
        for file in (out, err, told):
            file.seek(0)
            texts.append(file.read())
    return {"out": texts[0], "err": texts[1], **json.loads(texts[2])}


if __name__ == "__main__":
    before = imported(sys.argv[1:])
    found = [start(*command) for command in json.load(sys.stdin)]
    print(json.dumps([told | {"seconds": told["seconds"] + before} for told in found]))
