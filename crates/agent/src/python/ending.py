# The end of a program.

_loaded = set()
_libc = ctypes.CDLL(None)
_libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
# Looked up once.
_libc.exit, _libc.fflush  # noqa: B018
_exit_functions = atexit._run_exitfuncs
_pid = os.getpid()
# PID 1 is the agent. It takes the status for the process's end.
_AGENT = 1
_ENDED = signal.SIGRTMIN


class _LinkMap(ctypes.Structure):
    """struct link_map of <link.h>."""


_LinkMap._fields_ = [
    ("address", ctypes.c_void_p),
    ("name", ctypes.c_char_p),
    ("dynamic", ctypes.c_void_p),
    ("next", ctypes.POINTER(_LinkMap)),
    ("previous", ctypes.POINTER(_LinkMap)),
]


class _Debug(ctypes.Structure):
    """The beginning of struct r_debug of <link.h>."""

    _fields_ = [("version", ctypes.c_int), ("map", ctypes.POINTER(_LinkMap))]


def _last_library():
    library = _Debug.in_dll(_libc, "_r_debug").map.contents
    while library.next:
        library = library.next.contents
    return library


def _has_new_libraries():
    """Whether the program has loaded a library that the template had not."""
    return bool(_modules["library"].next) if "library" in _modules else True


def _new_modules():
    """The modules that the program has imported, latest first. They follow the template's."""
    names = []
    for name in reversed(sys.modules):
        if name == _modules.get("last"):
            break
        if name not in _loaded:
            names.append(name)
    return names


# Modules of the template that programs put things into.
_SHARED = builtins, sys


def _drop_modules():
    """Lets go of the program's modules, has what only they held collected while its globals are still
    there, and only then clears what is left of them: as CPython's own end does."""
    for name in ("last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    names = _new_modules()
    modules = [sys.modules.pop(name) for name in names]
    modules.append(_modules.pop("main"))
    if sys.modules.get("__main__") is modules[-1]:
        sys.modules["__main__"] = None
    modules = [weakref.ref(module) for module in modules if isinstance(module, types.ModuleType)]
    _collect()
    for reference in modules:
        module = reference()
        if module is not None:
            _clear(module.__dict__)
            del module
    for module in _SHARED:
        space = module.__dict__
        for _ in range(len(space) - _modules[module.__name__]):
            space.popitem()
    if modules:
        _collect()


def _collect():
    """What has lived long is in the oldest generation; without any, the two younger ones are all."""
    gc.collect(2 if gc.get_objects(2) else 1)


def _finalize(status):
    """Ends as python3 does, as far as a program can tell, but leaves what was loaded before the
    fork alone: tearing that down would copy each of its pages only to throw it away."""
    _end_threads()
    _exit_functions()
    flushed = _flush()
    if not flushed:
        status = 120
    if len(threading._active) > 1:
        # Daemon threads must not see half-cleared modules: leave it all to the interpreter.
        sys.exit(status)
    _drop_modules()
    _flush(tell=flushed)
    if _has_new_libraries():
        _libc.exit(status)
    _libc.fflush(None)
    _tell(status)
    os._exit(status)


def _find_main_thread():
    """The main thread, if its end can be told without a call: threading as of CPython 3.11."""
    main = threading.main_thread()
    names = "_shutdown_locks", "_threading_atexits", "_SHUTTING_DOWN", "_active"
    if hasattr(main, "_is_stopped") and all(hasattr(threading, name) for name in names):
        return main
    return None


_main_thread = _find_main_thread()


def _end_threads():
    """threading._shutdown(); with no thread but this one it has nothing to do but to say so."""
    if _main_thread is None or len(threading._shutdown_locks) > 1 or threading._threading_atexits:
        threading._shutdown()
    else:
        _main_thread._is_stopped = True
        threading._SHUTTING_DOWN = True


def _rehearse_end():
    """What the end of a short program does, and undoes what cannot be done twice."""
    if _main_thread is not None:
        _end_threads()
        _main_thread._is_stopped = False
        threading._SHUTTING_DOWN = False
    _new_modules()
    if "last" in _modules:
        _modules["main"] = _new_main()
        _drop_modules()
        sys.modules["__main__"] = _modules["driver"]
    _has_new_libraries()
    _libc.fflush(None)
    # Signal 0: it is only looked whether it could be sent.
    _libc.sigqueue(_pid, 0, 0)


def _tell(status):
    """Has the agent take it for ended: all that is left is to give its memory back, for which nobody
    needs to wait. The agent does that with the process."""
    if os.getpid() != _pid:
        return
    if _libc.sigqueue(_AGENT, _ENDED, status) == 0:
        while True:
            signal.pause()


def _clear(namespace):
    """Drops a module's objects, oldest first, as CPython's own end does."""
    for name in list(namespace):
        if name != "__builtins__":
            namespace[name] = None


def _flush(tell=True):
    """Whether standard output could be flushed; python3 exits with 120 when not, and says so once."""
    good = True
    for stream in (getattr(sys, "stdout", None), getattr(sys, "stderr", None)):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as error:
            if stream is getattr(sys, "stdout", None):
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
    _flush(tell=False)
    print(code, file=sys.stderr)
    return 1


def _interrupted():
    """How python3 ends on Ctrl-C: exit functions, then death by the signal."""
    threading._shutdown()
    _exit_functions()
    _flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
