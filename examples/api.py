"""Running untrusted code from Python, over the engine's socket: no process a run, output as it comes.

    zygote status || zygote run -c pass        # an engine that stays
    python3 examples/api.py [SOCKET]
"""

import http.client
import json
import os
import socket
import sys


class Engine(http.client.HTTPConnection):
    """HTTP over a Unix socket, with the standard library alone."""

    def __init__(self, path: str):
        super().__init__("localhost", timeout=600)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def events(self, request: dict):
        """Runs something; gives its events as they happen (docs/api.md)."""
        headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
        self.request("POST", "/v1/exec", json.dumps(request), headers)
        answer = self.getresponse()
        if answer.status != 200:
            error = json.load(answer)["error"]
            raise RuntimeError(f"{error['code']}: {error['message']}")
        for line in answer:
            yield json.loads(line)


def default_socket() -> str:
    given = os.environ.get("ZYGOTE_SOCKET")
    folder = "/run" if os.geteuid() == 0 else os.environ["XDG_RUNTIME_DIR"]
    return given or f"{folder}/zygote/zygote.sock"


if __name__ == "__main__":
    engine = Engine(sys.argv[1] if len(sys.argv) > 1 else default_socket())
    code = "for n in range(3): print('line', n, flush=True)\nopen('answer', 'w').write('42')"
    for event in engine.events({"code": code, "get": ["answer"], "timeout_seconds": 30}):
        if event["type"] == "stdout":
            print("came:", event["data"].strip())
        elif event["type"] == "get" and event["piece"] == "data":
            print("file:", event["data"])
        elif event["type"] == "result":
            print("exit code", event["exit_code"], "after", round(event["total_time_ms"]), "ms")
        elif event["type"] == "error":
            print("failed:", event["error"]["message"])
