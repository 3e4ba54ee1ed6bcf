"""Running untrusted code from Python, by the command line: one object whatever happens.

    python3 examples/run.py
"""

import json
import subprocess


def run(code: str, timeout: str = "10s", template: str = "python") -> dict:
    """Runs code in a fresh fork; gives back what `zygote run --json` prints (docs/json.md)."""
    command = ["zygote", "run", "--json", "-t", template, "--timeout", timeout, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(ran.stdout)
    if "exit_code" not in result:
        # There was no run: Zygote itself failed.
        raise RuntimeError(f"{result['error']['code']}: {result['error']['message']}")
    return result


if __name__ == "__main__":
    good = run("import numpy; print(numpy.arange(4).sum())")
    print("said", good["stdout"].strip(), "and exited with", good["exit_code"])
    endless = run("print('so far'); import time\nwhile True: time.sleep(1)", timeout="3s")
    print("timed out:", endless["timed_out"], "after it said", endless["stdout"].strip())
    try:
        run("1", template="nope")
    except RuntimeError as error:
        print("refused:", error)
