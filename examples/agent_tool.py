"""A code interpreter as an agent's tool: what the model wrote goes in, what it may read comes back.

The description is JSON Schema, as the APIs of model providers take tools.

    python3 examples/agent_tool.py
"""

import json
import subprocess

TOOL = {
    "name": "python",
    "description": "Runs Python 3.11 with numpy in a fresh virtual machine without network. "
    "Nothing is kept between calls; print what you want to see.",
    "input_schema": {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    },
}
SHOWN_CHARACTERS = 4000


def call(arguments: dict) -> str:
    """What the model is told of a call."""
    command = ["zygote", "run", "--json", "--timeout", "30s", "-c", arguments["code"]]
    ran = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(ran.stdout)
    if "exit_code" not in result:
        return f"the interpreter is not available: {result['error']['message']}"
    parts = [result["stdout"] or "", result["stderr"] or ""]
    if result["error"]:
        parts.append(result["error"]["message"])
    parts.append(f"(exit code {result['exit_code']})")
    told = "\n".join(part.strip() for part in parts if part.strip())
    if len(told) > SHOWN_CHARACTERS:
        half = SHOWN_CHARACTERS // 2
        told = f"{told[:half]}\n… {len(told) - SHOWN_CHARACTERS} characters left out …\n{told[-half:]}"
    return told


if __name__ == "__main__":
    print(json.dumps(TOOL, indent=2))
    print(call({"code": "import numpy as np; print(np.linalg.eigvals(np.eye(2) * 3))"}))
    print(call({"code": "import requests"}))
