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
    for name in _new_modules():
        module = sys.modules.pop(name)
        if isinstance(module, types.ModuleType) and name != "__main__":
            _clear(module.__dict__)
    _clear(namespace)
    # What has lived long is in the oldest generation; without any, the two younger ones are all.
    gc.collect(2 if gc.get_objects(2) else 1)
    _flush(tell=flushed)
    if _has_new_libraries():
        _libc.exit(status)
    _libc.fflush(None)
    _tell(status)
    os._exit(status)


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
