"""Private homes that outlast a session and cannot outgrow their quota: one ext4 file system in a file a user."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from millpond.store.errors import IsolationFailed


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise IsolationFailed(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")


def make_home(image: Path, quota: int, uid: int) -> bool:
    """Make the file system in `image` unless it is there, `quota` bytes large and owned by `uid`; whether it was made.

    A quota that was raised grows it. One that was lowered does not shrink it: the check inside then fails the spawn.
    """
    made = not image.exists()
    if made:
        fresh = image.with_suffix(".new")
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        os.truncate(fresh, quota)  # sparse: takes room as it fills
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", f"root_owner={uid}:{uid}", fresh)
        fresh.rename(image)
    elif image.stat().st_size < quota:
        os.truncate(image, quota)
        _run("e2fsck", "-f", "-p", image)
        _run("resize2fs", image)
    return made


def mount_home(image: Path, folder: Path) -> None:
    """Mount `image` at `folder`; no set-user-id programs and no devices are heeded there."""
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _run("mount", "-o", "loop,nosuid,nodev,noatime", image, folder)


def unmount_home(folder: Path) -> None:
    """Unmount `folder` if something is mounted there; the loop device goes with it."""
    if os.path.ismount(folder):
        _run("umount", folder)
