//! However a program ends, a fork ends as `python3` does: the same output, the same last words, the same
//! exit status.

#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::Value;
use zygote_tests::*;

/// Programs, each of which ends in its own way.
const PROGRAMS: &[&str] = &[
    "print('plain')",
    "import sys; print('a', end=''); sys.exit()",
    "import sys; sys.exit(3)",
    "import sys; print('out'); sys.exit('last words')",
    "import sys; sys.exit(257)",
    "import sys; sys.exit(-1)",
    "import sys; sys.exit(1 << 70)",
    "raise SystemExit((1, 2))",
    "import sys\ntry:\n    sys.exit(2)\nfinally:\n    print('finally')",
    "raise ValueError('of its own')",
    "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError('k') from e",
    "e = RuntimeError('noted'); e.add_note('a note'); raise e",
    "raise KeyboardInterrupt",
    "def f(): f()\ntry: f()\nexcept RecursionError as e: print(e)",
    "x = (",
    "print('\\ud800')",
    "import os; print('lost', end=''); os._exit(5)",
    "import os; print('kept', flush=True); os.abort()",
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(6))\n\
     signal.raise_signal(signal.SIGTERM)",
    "import atexit\nfor n in 'abc': atexit.register(print, n)\nprint('first')",
    "import atexit\n@atexit.register\ndef f(): 1/0\natexit.register(print, 'b')",
    "import atexit, sys\natexit.register(lambda: sys.exit(4)); atexit.register(print, 'b')",
    "import atexit\natexit.register(lambda: atexit.register(print, 'late'))",
    "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()\n\
     print('main')",
    "import threading, time\nthreading.Thread(target=lambda: time.sleep(100), daemon=True).start()\n\
     print('main')",
    "import threading, time\ndef f():\n    while True: time.sleep(0.001)\n\
     for _ in range(3): threading.Thread(target=f, daemon=True).start()\nimport sys; sys.exit(8)",
    "import threading, sys\nt = threading.Thread(target=lambda: sys.exit(3)); t.start(); t.join()",
    "import threading\nt = threading.Thread(target=lambda: 1/0, name='t'); t.start(); t.join()",
    "import threading\nl = threading.local(); l.x = print\nprint('local')",
    "from concurrent.futures import ThreadPoolExecutor as P\nimport time\np = P(2)\n\
     [p.submit(lambda n=n: (time.sleep(0.05), print(n, end=''))) for n in [1, 1, 1]]",
    "import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'finalized')",
    "import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'no').atexit = False\nprint('x')",
    "class A:\n    def __del__(self): print('gone')\na = A()",
    "class A:\n    def __del__(self): print('cycle gone')\na = A(); a.a = a; del a\nprint('last')",
    "class A:\n    def __init__(s, n): s.n = n\n    def __del__(s): print('del', s.n)\n\
     a = A(1); b = A(2); c = A(3)",
    "import gc\nclass A:\n    def __del__(self): print('old cycle gone')\n\
     a = A(); a.a = a\nfor _ in range(3): gc.collect()",
    "import gc; gc.disable()\nclass A:\n    def __del__(self): print('still gone')\na = A(); a.a = a; del a",
    "import sys\nclass A:\n    def __del__(self): print(sys is not None, len is not None)\na = A()",
    "class A:\n    def __del__(self): 1/0\na = A()",
    "import sys\nclass A:\n    def __del__(self): 1/0\nsys.unraisablehook = lambda u: print('hook', u.exc_type)\na = A(); del a",
    "import builtins\nclass A:\n    def __del__(self): print('in builtins')\nbuiltins.keep = A()\nprint('x')",
    "import sys, types\nclass A:\n    def __del__(self): print('in a module')\n\
     m = types.ModuleType('m'); m.a = A(); sys.modules['m'] = m; del m",
    "def g():\n    try: yield 1\n    finally: print('closed')\nx = g(); next(x)",
    "import contextlib\n@contextlib.contextmanager\ndef c():\n    try: yield\n    finally: print('left')\n\
     x = c(); x.__enter__()",
    "import asyncio\nasync def main():\n    await asyncio.sleep(0); print('async'); return 1\nasyncio.run(main())",
    "async def f(): pass\nf()",
    "import os; f = os.fdopen(os.dup(1), 'w'); f.write('unflushed')",
    "import os; f = os.fdopen(os.dup(1), 'wb', 100); f.write(b'bytes'); print('text')",
    "import sys; sys.stdout.write('no line end')",
    "import sys, io; sys.stdout = io.StringIO(); print('for nobody')",
    "import sys; print('before'); sys.stdout.close()",
    "import sys; sys.stdout = None; print('nowhere')",
    "import sys; del sys.stdout",
    "import os; print('x'); os.close(2)",
    "import sys\nsys.excepthook = lambda *a: print('hooked', a[0])\n1/0",
    "import sys\ndef hook(*a): raise ValueError('in the hook')\nsys.excepthook = hook\n1/0",
    "import sys\nsys.excepthook = lambda *a: sys.exit(9)\n1/0",
    "import subprocess; subprocess.run(['sh', '-c', 'echo child; exit 3'])",
    "import subprocess; p = subprocess.Popen(['sleep', '0.1']); print('left')",
    "import os\nif os.fork() == 0:\n    print('child')\nelse:\n    os.wait(); print('parent')",
    "import os, sys\nif os.fork() == 0: sys.exit(7)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
    "import os\nos.execvp('sh', ['sh', '-c', 'echo another; exit 11'])",
    "import multiprocessing as m\np = m.get_context('fork').Process(target=print, args=('p',)); p.start(); p.join()",
    "import tempfile; d = tempfile.TemporaryDirectory(); print('made')",
    "import logging; logging.basicConfig(); logging.error('logged'); logging.shutdown()",
    "import ctypes; ctypes.CDLL(None).printf(b'in the C library\\n')",
    "import sqlite3; c = sqlite3.connect(':memory:'); print(c.execute('select 1').fetchall())",
    "import sys; del sys.modules['__main__']; print('no main')",
    "import sys; sys.modules.clear(); print('no modules')",
    "import warnings; warnings.warn('careful')",
    "import numpy; print(numpy.ones(3)); raise numpy.linalg.LinAlgError('n')",
    "print(open('/proc/self/stat').read().split()[6])",
    "import sys; sys.setrecursionlimit(50)\nclass A:\n    def __del__(self): print('x')\na = A()",
];

/// Runs each program by itself in the same guest, by the python3 there.
const REAL: &str = "\
import json, subprocess, sys
for code in json.load(sys.stdin):
    p = subprocess.run(['python3', '-c', code], stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    print(json.dumps([p.stdout.decode(), p.stderr.decode(), p.returncode % 256 if p.returncode >= 0 else 128 - p.returncode]))
";

/// Without what differs from run to run: addresses, and numbers of processes and threads.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("0x") {
        plain.push_str(&rest[..at]);
        plain.push_str("0x…");
        rest = rest[at + 2..].trim_start_matches(|letter: char| letter.is_ascii_hexdigit());
    }
    plain + rest
}

#[test]
fn every_program_ends_as_python3_ends_it() {
    let input = serde_json::to_vec(PROGRAMS).unwrap();
    let arguments = ["run", "--timeout", "10m", "--", "python3", "-c", REAL];
    let real = zygote_with_input(&arguments, &input).good().json();
    assert_eq!(real.len(), PROGRAMS.len());
    let mut wrong = Vec::new();
    for (program, real) in PROGRAMS.iter().zip(&real) {
        // Not with --json, which has output as it is written.
        let fork = zygote(&["run", "--timeout", "60s", "-c", program]);
        let text = |value: &Value| plain(value.as_str().unwrap_or("not text"));
        let fork = (
            plain(&fork.text()),
            plain(&fork.error()),
            i64::from(fork.code),
        );
        let code = real[2].as_i64().unwrap();
        let real = (text(&real[0]), text(&real[1]), code);
        if fork != real {
            wrong.push(format!(
                "{program}\n  fork:    {fork:?}\n  python3: {real:?}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}
