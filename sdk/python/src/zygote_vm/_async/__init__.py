"""For those who await."""

from .client import AsyncClient
from .files import AsyncFiles
from .process import AsyncProcess
from .sandbox import AsyncSandbox

__all__ = ["AsyncClient", "AsyncFiles", "AsyncProcess", "AsyncSandbox"]
