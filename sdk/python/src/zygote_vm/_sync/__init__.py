"""For those who do not await. Made by tools/make_sync.py."""

from .client import Client
from .files import Files
from .process import Process
from .sandbox import Sandbox

__all__ = ["Client", "Files", "Process", "Sandbox"]
