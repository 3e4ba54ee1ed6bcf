"""The warm interpreter: Python with its modules loaded, waiting to become somebody's program.

It is started while a template is built, with its standard streams being those of the program to
come, and a control channel to the agent. A request is `u32 total`, then items, each `u32 length`
and bytes, little-endian. Requests:

    warm CODE                                  run CODE and keep what it loaded
    reseed SEED                                give the generators a state that no other fork has
    run SEED KIND NAME CONTENT CWD LINES NARGS ARGS... ENV...
                                               become `python3 -c|FILE|-`; never returns

After `run` the process is what `python3` would be: a fresh `__main__`, the program's argv,
environment and directory, and no trace of this file in tracebacks.
"""

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
import types

_hooks = []
_generators = []
_loaded = set()
_libc_exit = ctypes.CDLL(None).exit
_exit_functions = atexit._run_exitfuncs


def register_after_fork(function):
    """Calls function(seed: bytes) in every fork, before any of its user's code."""
    _hooks.append(function)
    return function


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
    _loaded.update(sys.modules)
    gc.collect()
    _generators.extend(_find_generators())
    gc.freeze()
    return ""


def _find_generators():
    """The generators that the warm-up has left, but for those of the modules themselves."""
    kinds, known = [], []
    if "random" in sys.modules:
        random = sys.modules["random"]
        kinds.append(random.Random)
        known.append(random._inst)
    if "numpy.random" in sys.modules:
        numpy = sys.modules["numpy.random"]
        # What a Generator or a RandomState draws from is a BitGenerator.
        kinds += [numpy.RandomState, numpy.BitGenerator]
        known += [numpy.mtrand._rand, numpy.mtrand._rand._bit_generator]
    kinds = tuple(kinds)
    known = set(map(id, known))
    return [
        thing
        for thing in gc.get_objects()
        if issubclass(type(thing), kinds) and id(thing) not in known
    ]


def _reseed_found(seed):
    for index, generator in enumerate(_generators):
        entropy = index << (8 * len(seed)) | int.from_bytes(seed, "little")
        if "random" in sys.modules and isinstance(generator, sys.modules["random"].Random):
            generator.seed(entropy)
            continue
        numpy = sys.modules["numpy.random"]
        if isinstance(generator, numpy.BitGenerator):
            generator.state = type(generator)(numpy.SeedSequence(entropy)).state
        else:
            # The second of a pair of normal numbers, which it keeps for the next call.
            generator.set_state({**generator.get_state(legacy=False), "has_gauss": 0, "gauss": 0.0})


def _reseed(seed):
    """Gives every generator that is loaded a state that no other fork has."""
    modules = sys.modules
    _reseed_found(seed)
    if "random" in modules:
        modules["random"].seed(int.from_bytes(seed[:32], "little"))
    if "numpy.random" in modules:
        words = [int.from_bytes(seed[at : at + 4], "little") for at in range(32, 64, 4)]
        modules["numpy.random"].seed(words)
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    if "uuid" in modules:
        modules["uuid"]._node = None
        modules["uuid"]._last_timestamp = None
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None
    if "multiprocessing.process" in modules:
        modules["multiprocessing.process"].current_process().authkey = os.urandom(32)
    for hook in _hooks:
        hook(seed)


def _prepare(request, control):
    """Becomes the program up to its code; gives back the code's bytes, its name, its namespace."""
    seed, kind, name, content, cwd, lines, count, *rest = request[1:]
    os.close(control)
    count = int(count)
    arguments = [os.fsdecode(item) for item in rest[:count]]
    pairs = rest[count:]
    os.environb.clear()
    for key, value in zip(pairs[::2], pairs[1::2]):
        os.environb[key] = value
    os.chdir(cwd)
    if seed:
        _reseed(seed)
    if lines == b"1":
        sys.stdout.reconfigure(line_buffering=True)
    main = types.ModuleType("__main__")
    namespace = main.__dict__
    namespace["__annotations__"] = {}
    namespace["__builtins__"] = sys.modules["builtins"]
    namespace["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
    sys.modules["__main__"] = main
    name = os.fsdecode(name)
    if kind == b"file":
        import importlib.machinery

        path = os.fsdecode(content)
        sys.argv = [name, *arguments]
        sys.orig_argv = ["python3", name, *arguments]
        if _is_application(path):
            sys.path[0] = path
            return None, path, namespace
        sys.path[0] = os.path.dirname(path)
        namespace["__file__"] = path
        namespace["__cached__"] = None
        namespace["__loader__"] = importlib.machinery.SourceFileLoader("__main__", path)
        with open(path, "rb") as file:
            content = file.read()
        name = path
    else:
        flag = "-c" if kind == b"code" else "-"
        sys.argv = [flag, *arguments]
        sys.path[0] = ""
        sys.orig_argv = ["python3", flag, *([os.fsdecode(content)] if kind == b"code" else []), *arguments]
        if kind == b"code":
            name = "<string>"
        else:
            name = "<stdin>"
            namespace["__file__"] = name
            namespace["__cached__"] = None
            content = sys.stdin.buffer.read()
    return content, name, namespace


def _is_application(path):
    """Whether python3 would look for __main__ in it: a folder, or a zip archive."""
    if os.path.isdir(path):
        return True
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        # A zip archive's last record and its comment (APPNOTE.TXT §4.3.16).
        file.seek(max(0, file.tell() - 22 - 0xFFFF))
        return b"PK\x05\x06" in file.read()


def _finalize(namespace, status):
    """Ends as python3 does, as far as a program can tell, but leaves what was loaded before the
    fork alone: tearing that down would copy each of its pages only to throw it away."""
    threading._shutdown()
    _exit_functions()
    flushed = _flush()
    if not flushed:
        status = 120
    if threading.active_count() > 1:
        # Daemon threads must not see half-cleared modules: leave it all to the interpreter.
        sys.exit(status)
    for name in [name for name in sys.modules if name not in _loaded][::-1]:
        module = sys.modules.pop(name)
        if isinstance(module, types.ModuleType) and name != "__main__":
            _clear(module.__dict__)
    _clear(namespace)
    gc.collect()
    _flush(tell=flushed)
    _libc_exit(status)


def _clear(namespace):
    """Drops a module's objects, oldest first, as CPython's own end does."""
    for name in list(namespace):
        if name != "__builtins__":
            namespace[name] = None


def _flush(tell=True):
    """Whether standard output could be flushed; python3 exits with 120 when not, and says so once."""
    good = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:
            if stream is sys.stdout:
                if tell:
                    _tell_unraisable(error, stream)
                good = False
    return good


def _tell_unraisable(error, stream):
    """As python3 tells that the last flush fails; the default hook takes no object of ours."""
    if sys.unraisablehook is sys.__unraisablehook__:
        print(f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}", file=sys.stderr)
    else:
        sys.unraisablehook(
            types.SimpleNamespace(
                exc_type=type(error),
                exc_value=error,
                exc_traceback=None,
                err_msg=None,
                object=stream,
            )
        )


def _status_of(code):
    """The exit status of SystemExit(code)."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 0xFF
    sys.stdout.flush()
    print(code, file=sys.stderr)
    return 1


def _interrupted():
    """How python3 ends on Ctrl-C: exit functions, then death by the signal."""
    threading._shutdown()
    _exit_functions()
    _flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _serve(control):
    sys.modules["zygote"] = module = types.ModuleType("zygote")
    module.register_after_fork = register_after_fork
    while True:
        request = _receive(control)
        if request[0] == b"warm":
            _answer(control, _warm(request[1]))
        elif request[0] == b"reseed":
            _reseed(request[1])
        else:
            return _prepare(request, control)


def _run(content, name, namespace):
    """Runs the program; gives back the exit status that python3 would end with."""
    try:
        if content is None:
            import runpy

            runpy._run_module_as_main("__main__", alter_argv=False)
        else:
            exec(compile(content, name, "exec", dont_inherit=True), namespace)
        return 0
    except SystemExit as stop:
        return _status_of(stop.code)
    except BaseException as error:
        trace = error.__traceback__.tb_next
        error = error.with_traceback(trace)
        kind = type(error)
        sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
        try:
            sys.excepthook(kind, error, trace)
        except SystemExit as stop:
            return _status_of(stop.code)
        finally:
            interrupted = issubclass(kind, KeyboardInterrupt)
            del error, trace
        if interrupted:
            _interrupted()
        return 1


if __name__ == "__main__":
    _program = _serve(int(sys.argv[1]))
    _finalize(_program[2], _run(*_program))
