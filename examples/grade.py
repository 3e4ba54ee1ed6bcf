"""Grading submissions: each against the same tests, in a machine of its own.

    python3 examples/grade.py SUBMISSION.py...
"""

import concurrent.futures
import json
import pathlib
import subprocess
import sys

TESTS = """
import solution
assert solution.add(2, 3) == 5, "add(2, 3)"
assert solution.add(-1, 1) == 0, "add(-1, 1)"
"""


def grade(submission: str) -> dict:
    """The submission goes in as a file; the tests are the program."""
    command = ["zygote", "run", "--json", "--timeout", "20s"]
    command += ["--copy", f"{submission}:solution.py", "-c", TESTS]
    ran = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(ran.stdout)
    if "exit_code" not in result:
        raise RuntimeError(result["error"]["message"])
    words = (result["stderr"] or "").strip().splitlines()
    return {
        "submission": pathlib.Path(submission).name,
        "passed": result["exit_code"] == 0,
        "why": (result["error"] or {}).get("message") or (words[-1] if words else ""),
    }


if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        for graded in pool.map(grade, sys.argv[1:]):
            print(json.dumps(graded))
