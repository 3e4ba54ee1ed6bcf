# An interpreter that stays: cells of code, one after the other, in one namespace.
#
# A request is `cell CODE`. What comes of it goes to the agent as events, in the encoding of the agent's own
# messages (protocol's CellEvent, as postcard): while the cell runs, what it displays, each of which is
# answered with a byte, so that it stays in order with what is printed; at its end, how it went. Before all that it tells
# the agent alone that it has begun: from then on it heeds interrupts.

_AWAIT_FLAG = 0x2000  # ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
_COROUTINE = 0x80  # inspect.CO_COROUTINE
_EVENT_MAX_BYTES = 16 << 20
_BEGUN = b"\x02"  # As the agent has it (context.rs).
_TRACEBACK_LINES = 200
_RESEED_TLS, _RESEED_ALL = 64, 63  # As the agent has them (context.rs).

# Ways of showing an object, by the names that Jupyter gives their methods, and what they give.
_REPRESENTATIONS = (
    ("_repr_html_", "text/html"),
    ("_repr_markdown_", "text/markdown"),
    ("_repr_svg_", "image/svg+xml"),
    ("_repr_png_", "image/png"),
    ("_repr_jpeg_", "image/jpeg"),
    ("_repr_latex_", "text/latex"),
    ("_repr_json_", "application/json"),
    ("_repr_javascript_", "application/javascript"),
    ("_repr_pdf_", "application/pdf"),
)


def _varint(number):
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _blob(data):
    if isinstance(data, str):
        data = data.encode("utf-8", "backslashreplace")
    return _varint(len(data)) + data


def _list(items):
    items = list(items)
    return _varint(len(items)) + b"".join(items)


def _bundle(shown):
    return _list(_blob(kind) + _blob(data) for kind, data in shown.items())


class _Context:
    def __init__(self, control, namespace):
        self.control = control
        self.namespace = namespace
        self.count = 0
        self.loop = None
        self.is_running = False

    def serve(self):
        """Runs cells until the agent hangs up, which ends the process."""
        signal.signal(signal.SIGINT, self._interrupted)
        # In a branch: what follows is not what its source goes on with.
        signal.signal(_RESEED_TLS, lambda number, frame: _reseed_tls())
        signal.signal(_RESEED_ALL, lambda number, frame: _reseed(os.urandom(64)))
        while True:
            request = _receive(self.control)
            if request[0] == b"cell":
                self._cell(request[1])

    def _interrupted(self, number, frame):
        if self.is_running:
            signal.default_int_handler(number, frame)

    def _cell(self, code):
        self.count += 1
        shown, failure = None, None
        try:
            try:
                self.is_running = True
                self._send(_BEGUN)
                value = self._evaluate(code.decode("utf-8", "surrogateescape"))
                self._show_figures()
                if value is not None:
                    builtins._ = value
                    shown = _represent(value)
            finally:
                self.is_running = False
        except BaseException as error:
            failure = error
        failure = None if failure is None else _describe(failure)
        _flush(tell=False)
        self._send(
            b"\x01"
            + _varint(self.count)
            + (b"\x00" if shown is None else b"\x01" + _bundle(shown))
            + (b"\x00" if failure is None else b"\x01" + failure)
        )

    def _evaluate(self, code):
        """Runs a cell; gives back the value of its last expression."""
        import ast

        name = f"<cell {self.count}>"
        _remember(name, code)
        tree = compile(code, name, "exec", ast.PyCF_ONLY_AST | _AWAIT_FLAG, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr) and not _is_silent(code):
            last = ast.Expression(tree.body.pop().value)
        if tree.body:
            self._execute(compile(tree, name, "exec", _AWAIT_FLAG, dont_inherit=True))
        if last is None:
            return None
        return self._execute(compile(last, name, "eval", _AWAIT_FLAG, dont_inherit=True))

    def _execute(self, code):
        value = eval(code, self.namespace)
        if code.co_flags & _COROUTINE:
            return self._await(value)
        return value

    def _await(self, coroutine):
        import asyncio

        if self.loop is None or self.loop.is_closed():
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        task = self.loop.create_task(coroutine)
        try:
            return self.loop.run_until_complete(task)
        except BaseException:
            if not task.done():
                task.cancel()
            raise

    def display(self, *objects, raw=False):
        """Shows objects as Jupyter's display does; with raw=True, bundles of kinds and data."""
        for thing in objects:
            shown = {**thing} if raw else _represent(thing)
            _flush(tell=False)
            self._send(b"\x00" + _bundle(shown))
            # The agent has passed on what was printed before.
            os.read(self.control, 1)

    def _show_figures(self):
        """What matplotlib has drawn and nobody has shown, as in a notebook."""
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is None:
            return
        for number in pyplot.get_fignums():
            self.display(pyplot.figure(number))
        pyplot.close("all")

    def _send(self, event):
        if len(event) > _EVENT_MAX_BYTES:
            error = f"what was to be shown has {len(event)} bytes; at most {_EVENT_MAX_BYTES}"
            failure = _blob("ValueError") + _blob(error) + _list([])
            event = b"\x01" + _varint(self.count) + b"\x00\x01" + failure
        data = len(event).to_bytes(4, "little") + event
        while data:
            data = data[os.write(self.control, data) :]


def _is_silent(code):
    """Whether a cell ends in a semicolon, which keeps its value from being shown."""
    if ";" not in code:
        return False
    import tokenize

    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    nothing = tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER
    nothing += tokenize.INDENT, tokenize.DEDENT
    tokens = [token.string for token in tokens if token.type not in nothing]
    return bool(tokens) and tokens[-1] == ";"


def _remember(name, code):
    """For tracebacks, which show lines."""
    import linecache

    linecache.cache[name] = len(code), None, code.splitlines(True), name


def _represent(thing):
    """All ways in which an object can be shown, as Jupyter's display protocol has it."""
    shown = {"text/plain": _text(thing)}
    if isinstance(thing, type):
        return shown
    figure = sys.modules.get("matplotlib.figure")
    if figure is not None and isinstance(thing, figure.Figure):
        shown["image/png"] = _figure(thing)
        return shown
    bundle = _call(thing, "_repr_mimebundle_")
    if isinstance(bundle, tuple):
        bundle = bundle[0]
    if isinstance(bundle, dict):
        shown.update((str(kind), _data(kind, data)) for kind, data in bundle.items())
    for method, kind in _REPRESENTATIONS:
        data = _call(thing, method)
        if isinstance(data, tuple) and data:
            data = data[0]
        if data is not None and kind not in shown:
            shown[kind] = _data(kind, data)
    return shown


def _text(thing):
    try:
        return repr(thing)
    except Exception as error:
        return f"<{type(thing).__name__}, whose repr raises {type(error).__name__}: {error}>"


def _call(thing, method):
    """What a method gives; one that fails shows nothing, as in Jupyter."""
    try:
        found = getattr(thing, method, None)
        # What answers to every name has none of them.
        if found is None or getattr(thing, "_no_method_of_anybody_", None) is not None:
            return None
        return found(include=None, exclude=None) if method == "_repr_mimebundle_" else found()
    except Exception:
        return None


def _data(kind, data):
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    if isinstance(data, str):
        if kind.startswith("image/") and kind != "image/svg+xml" or kind == "application/pdf":
            # Jupyter's own objects give these as base64.
            import base64

            try:
                return base64.b64decode(data, validate=True)
            except ValueError:
                return data
        return data
    import json

    return json.dumps(data)


def _figure(figure):
    from io import BytesIO

    data = BytesIO()
    figure.savefig(data, format="png", bbox_inches="tight")
    return data.getvalue()


def _describe(error):
    """An exception: its name, what it says, its traceback without our own frames."""
    import traceback

    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    try:
        lines = traceback.format_exception(type(error), error, trace)
    except Exception:
        lines = [f"{type(error).__name__}\n"]
    lines = "".join(lines).splitlines()
    if len(lines) > _TRACEBACK_LINES:
        lines = lines[: _TRACEBACK_LINES // 2] + ["..."] + lines[-_TRACEBACK_LINES // 2 :]
    try:
        words = str(error)
    except Exception:
        words = ""
    return _blob(type(error).__name__) + _blob(words) + _list(map(_blob, lines))


class _Backend:
    """Finds and fills the module of a backend of matplotlib's whose figures the context shows
    (matplotlib.backend_bases). It is made when matplotlib is: nothing is imported before that."""

    name = "zygote_figures"

    def __init__(self, context):
        self.context = context

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        import importlib.machinery

        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        from matplotlib.backend_bases import FigureManagerBase
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        module.FigureCanvas = FigureCanvasAgg
        module.FigureManager = FigureManagerBase
        module.show = lambda *arguments, **options: self.context._show_figures()


def _context(request, control):
    """Becomes a context; never returns."""
    seed, cwd, *pairs = request[1:]
    for key, value in zip(pairs[::2], pairs[1::2]):
        os.environb[key] = value
    if cwd:
        os.chdir(cwd)
    if seed:
        _reseed(seed)
    main = _modules.get("main") or _new_main()
    sys.modules["__main__"] = main
    sys.argv = [""]
    sys.path[0] = ""
    sys.stdout.reconfigure(line_buffering=True)
    context = _Context(control, main.__dict__)
    sys.meta_path.append(_Backend(context))
    if "MPLBACKEND" not in os.environ:
        os.environ["MPLBACKEND"] = f"module://{_Backend.name}"
        if "matplotlib" in sys.modules:
            # Of the template, which had none to show figures by.
            sys.modules["matplotlib"].use(os.environ["MPLBACKEND"])
    builtins.display = context.display
    sys.modules["zygote"].display = context.display
    context.serve()
