"""The client of the gateway: `connect` gives a lake whose rows stay in the vault.

Needs httpx, NumPy, pandas and Matplotlib; PyTorch only to trace graphs.
"""

from __future__ import annotations

from millpond.hub.client.futures import JobFuture, as_completed
from millpond.hub.client.lake import RemoteLake, connect

__all__ = ["JobFuture", "RemoteLake", "as_completed", "connect"]
