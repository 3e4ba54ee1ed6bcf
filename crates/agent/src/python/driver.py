"""The warm interpreter: Python with its modules loaded, waiting to become somebody's program.

It is started while a template is built, with its standard streams being those of the program to
come, and a control channel to the agent. A request is `u32 total`, then items, each `u32 length`
and bytes, little-endian. Requests:

    warm CODE                                  run CODE and keep what it loaded
    reseed SEED                                give the generators a state that no other fork has
    run SEED KIND NAME CONTENT CWD LINES NARGS ARGS... ENV...
                                               become `python3 -c|FILE|-`; never returns
    context SEED CWD ENV...                    become an interpreter that stays; see context.py

CWD is empty for the directory in which it waits, and ENV has only what comes to the environment that
it has. After `run` the process is what `python3` would be: a fresh `__main__`, the program's argv,
environment and directory, and no trace of this file in tracebacks.

A fork pays for each page that it touches, so everything here that can be done before the snapshot is
done then (`_settle`), and the rest touches little: no walks over `sys.modules`, whose names' reference
counts lie in a hundred pages.
"""

import atexit
import builtins
import ctypes
import gc
import io
import os
import signal
import sys
import threading
import types
import weakref

# Serving the agent until there is a program.


def _receive(control):
    def exactly(count):
        data = bytearray()
        while len(data) < count:
            piece = os.read(control, count - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return bytes(data)

    data = exactly(int.from_bytes(exactly(4), "little"))
    items, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        items.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return items


def _answer(control, text):
    data = text.encode("utf-8", "replace")
    data = len(data).to_bytes(4, "little") + data
    while data:
        data = data[os.write(control, data) :]


def _warm(code):
    module = types.ModuleType("__zygote_warm__")
    try:
        exec(compile(code, "<warm-up>", "exec"), module.__dict__)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        import traceback

        return "".join(traceback.format_exception(error)) or repr(error)
    _settle()
    return "waits" if _only_waits() else "goes on"


def _only_waits():
    """Whether nothing will wake this process up but a request: no timer, and no thread that Python
    knows. The agent looks for others, and for children."""
    timers = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF
    if any(signal.getitimer(timer) != (0.0, 0.0) for timer in timers):
        return False
    try:
        with open("/proc/self/timers") as file:
            posix_timers = file.read()
    except OSError:
        posix_timers = ""
    return not posix_timers and threading.active_count() == 1


def _serve(control):
    sys.modules["zygote"] = module = types.ModuleType("zygote")
    module.register_after_fork = register_after_fork
    while True:
        request = _receive(control)
        if request[0] == b"warm":
            _answer(control, _warm(request[1]))
        elif request[0] == b"reseed":
            _reseed(request[1])
        elif request[0] == b"context":
            _context(request, control)
        else:
            return _prepare(request, control)


def _main():
    _finalize(_run(*_serve(int(sys.argv[1]))))
