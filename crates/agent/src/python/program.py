# Becoming a program.

# CPython 3.11 writes to a function's code until it has specialized it: after some ten runs, and again
# after the first specializations that do not hold.
_REHEARSALS = 100

_modules = {}
# Not to be closed with their last reference.
_kept = []
_environment = dict(os.environb)
_directory = os.getcwd()


def _settle():
    """Does what every program's start does, as far as it is the same for each, once the warm-up is
    over: the snapshot has it then."""
    for key in list(os.environb):
        if key not in _environment:
            del os.environb[key]
    for key, value in _environment.items():
        if os.environb.get(key) != value:
            os.environb[key] = value
    os.chdir(_directory)
    sys.argv = ["-c"]
    sys.path[0] = ""
    _modules["driver"] = sys.modules.pop("__main__")
    # Last of all, as it will be.
    sys.modules["__main__"] = _modules["driver"]
    gc.collect()
    _watch_generators()
    _rehearse()
    _collapse()
    _modules["library"] = _last_library()
    _modules["last"] = next(reversed(sys.modules))
    _loaded.update(sys.modules)
    for module in _SHARED:
        _modules[module.__name__] = len(module.__dict__)
    gc.collect()
    gc.freeze()
    for _ in range(_REHEARSALS):
        _rehearse()
    gc.freeze()
    # Young, so that the program's end can collect it.
    _modules["main"] = sys.modules["__main__"] = _new_main()


def _new_main():
    main = types.ModuleType("__main__")
    namespace = main.__dict__
    namespace["__annotations__"] = {}
    namespace["__builtins__"] = builtins
    namespace["__loader__"] = sys.modules["_frozen_importlib"].BuiltinImporter
    return main


def _collapse():
    """Has the kernel put memory into huge pages (madvise(2), MADV_COLLAPSE): a fork copies each page
    table that it walks, and these need none."""
    huge = 2 << 20
    with open("/proc/self/maps") as maps:
        for line in maps:
            where, rights, *_, path = [*line.split(maxsplit=5), ""][:6]
            if rights != "rw-p" or path.strip() not in ("", "[heap]"):
                continue
            start, end = (int(number, 16) for number in where.split("-"))
            start, end = -(-start // huge) * huge, end // huge * huge
            if start < end:
                _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 25)


def _rehearse():
    """What a short program does, for nobody to see."""
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    exec(compile(b"print(1)", "<string>", "exec", dont_inherit=True), {})
    _flush()
    os.dup2(kept, 1)
    os.close(kept)
    os.close(nowhere)
    _reseed(os.urandom(64))
    if "_ssl" in sys.modules:
        sys.modules["_ssl"].RAND_bytes(16)
    _rehearse_end()


def _unbuffer():
    """Standard output as python3 -u has it: text goes straight to the descriptor."""
    old = sys.stdout
    new = io.TextIOWrapper(
        old.buffer.raw,
        encoding=old.encoding,
        errors=old.errors,
        newline="\n",
        write_through=True,
    )
    new.mode = "w"
    sys.stdout = sys.__stdout__ = new
    _kept.append(old)


def _prepare(request, control):
    """Becomes the program up to its code; gives back the code's bytes, its name, its namespace."""
    seed, kind, name, content, cwd, lines, count, *rest = request[1:]
    os.close(control)
    arguments = []
    if rest:
        count = int(count)
        arguments = [os.fsdecode(item) for item in rest[:count]]
        pairs = rest[count:]
        for key, value in zip(pairs[::2], pairs[1::2]):
            os.environb[key] = value
    if cwd:
        os.chdir(cwd)
    if seed:
        _reseed(seed)
    if lines == b"1":
        sys.stdout.reconfigure(line_buffering=True)
    elif lines == b"2":
        _unbuffer()
    namespace = _modules["main"].__dict__
    if kind == b"file":
        name = os.fsdecode(name)
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
        return content, path, namespace
    if kind == b"code":
        if arguments:
            sys.argv += arguments
        sys.orig_argv = ["python3", "-c", os.fsdecode(content), *arguments]
        return content, "<string>", namespace
    sys.argv = ["-", *arguments]
    sys.orig_argv = ["python3", "-", *arguments]
    namespace["__file__"] = "<stdin>"
    namespace["__cached__"] = None
    return sys.stdin.buffer.read(), "<stdin>", namespace


def _is_application(path):
    """Whether python3 would look for __main__ in it: a folder, or a zip archive."""
    if os.path.isdir(path):
        return True
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        # A zip archive's last record and its comment (APPNOTE.TXT §4.3.16).
        file.seek(max(0, file.tell() - 22 - 0xFFFF))
        return b"PK\x05\x06" in file.read()


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
        failure = error.with_traceback(error.__traceback__.tb_next)
    # Not in the handler: what goes wrong from here on has nothing to do with the program's error.
    return _tell_failure(failure)


def _tell_failure(error):
    """Has the program's hook tell of its error; gives back the exit status."""
    kind, trace = type(error), error.__traceback__
    sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace
    try:
        if hasattr(sys, "excepthook"):
            sys.excepthook(kind, error, trace)
        else:
            print("sys.excepthook is missing", file=sys.stderr)
            sys.__excepthook__(kind, error, trace)
    except SystemExit as stop:
        return _status_of(stop.code)
    except BaseException as failure:
        print("Error in sys.excepthook:", file=sys.stderr)
        failure = failure.with_traceback(failure.__traceback__.tb_next)
        sys.__excepthook__(type(failure), failure, failure.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(kind, error, trace)
    if issubclass(kind, KeyboardInterrupt):
        _interrupted()
    return 1
