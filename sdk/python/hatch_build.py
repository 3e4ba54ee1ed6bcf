"""With ``ZYGOTE_WHEEL_TREE``, a folder that the program was installed into, the wheel brings that along."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

#: The program is built on Debian 12, with its C library.
TAG = "py3-none-manylinux_2_36_x86_64"


class ProgramHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        tree = os.environ.get("ZYGOTE_WHEEL_TREE")
        if not tree or version == "editable":
            return
        build_data["pure_python"] = False
        build_data["tag"] = TAG
        build_data["shared_scripts"][str(Path(tree) / "bin/zygote")] = "zygote"
        # Beside it, where it looks for it.
        build_data["shared_data"][str(Path(tree) / "lib/zygote/zygote-agent")] = "lib/zygote/zygote-agent"
