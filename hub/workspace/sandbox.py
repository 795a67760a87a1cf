"""The command line of bubblewrap for every part: workspaces, and also the hub, the proxy and the vault's programs.

Nothing of the machine is visible but what is listed: the system's programs and libraries, the Python environment and
Millpond's own code read-only, and the folders that the part needs. So the hub cannot read the lake even if somebody makes the
lake's folder world-readable.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import millpond

_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
_ETC = ("alternatives", "fonts", "ld.so.cache", "localtime", "ssl")


def python_folders() -> list[Path]:
    """What Python and Millpond need to be read: the environment, its interpreter, and the package's rooms."""
    package = Path(millpond.__file__).parent
    rooms = [package, *((package / room).resolve() for room in ("store", "capture", "analysis", "hub"))]
    found: list[Path] = []
    environments = [Path(prefix) for prefix in (sys.base_prefix, sys.prefix)]
    for folder in (*environments, *(path.resolve() for path in environments), *rooms):
        inside = any(folder.is_relative_to(other) for other in [*found, Path("/usr")])
        if folder not in found and not inside:
            found.append(folder)
    return found


def python_path() -> str:
    """The folder that holds the package, for PYTHONPATH."""
    return str(Path(millpond.__file__).parent.parent)


@dataclass(frozen=True)
class Sandbox:
    """What one part may see and be."""

    uid: int
    """Of the host; the group has the same number unless `gid` says otherwise."""
    gid: int | None = None
    home: Path = Path("/")
    """Its working folder, as it sees it."""
    read: Mapping[Path, Path] = field(default_factory=dict)
    """Folders and files of the host that it can read: where they are, where it sees them."""
    write: Mapping[Path, Path] = field(default_factory=dict)
    """Likewise, writable."""
    network: bool = False
    """Whether it shares the machine's network; otherwise it has a loopback interface of its own and nothing else."""
    scratch: int = 256 << 20
    """Bytes that /tmp and /dev/shm hold each."""
    hostname: str = "millpond"
    masks: Sequence[str] = ()
    """Further arguments of bubblewrap, after /proc is mounted."""
    etc: Path | None = None
    """Folder that gets the small files of /etc; made anew."""
    seccomp: int | None = None
    """Descriptor to read the filter of system calls from."""

    def command(self, program: Sequence[str]) -> list[str]:
        """The whole command line, to be run by root with the program's environment: other users can read a command line."""
        arguments = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if not self.network:
            arguments.append("--unshare-net")
        arguments += ["--hostname", self.hostname, "--die-with-parent", "--new-session"]
        arguments += ["--cap-drop", "ALL"]
        for needed in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # until setpriv has dropped them
            arguments += ["--cap-add", needed]
        made = {Path("/"), Path("/tmp"), Path("/usr")}
        system: list[str] = []
        for name in _SYSTEM:
            if Path(name).is_symlink():
                system += ["--symlink", str(Path(name).readlink()), name]
            elif Path(name).is_dir():
                system += ["--ro-bind", name, name]
        arguments += system
        arguments += [
            "--perms",
            "0755",
            "--dir",
            "/etc",
            "--perms",
            "0755",
            "--dir",
            "/var",
            "--symlink",
            "../run",
            "/var/run",
        ]
        made |= {Path("/etc"), Path("/var")}
        for name in _ETC:
            if Path("/etc", name).exists():
                arguments += ["--ro-bind", f"/etc/{name}", f"/etc/{name}"]
        for name, file in self._write_etc().items():
            arguments += ["--ro-bind", str(file), f"/etc/{name}"]
        size = str(self.scratch)
        arguments += ["--dev", "/dev", "--size", size, "--perms", "1777", "--tmpfs", "/dev/shm", "--proc", "/proc"]
        arguments += [*self.masks, "--size", size, "--perms", "1777", "--tmpfs", "/tmp"]
        arguments += ["--size", "1048576", "--perms", "0755", "--tmpfs", "/run"]
        made.add(Path("/run"))
        views = [(folder, folder, "--ro-bind") for folder in python_folders()]
        views += [(host, inside, "--ro-bind") for host, inside in self.read.items()]
        views += [(host, inside, "--bind") for host, inside in self.write.items()]
        for host, inside, kind in views:
            # bubblewrap makes missing parents with mode 0700, which nobody but root could pass
            for parent in reversed(inside.parents):
                if parent not in made and not any(parent.is_relative_to(view) for _, view, _ in views):
                    arguments += ["--perms", "0755", "--dir", str(parent)]
                    made.add(parent)
            arguments += [kind, str(host), str(inside)]
        arguments += ["--remount-ro", "/", "--chdir", "/"]
        if self.seccomp is not None:
            arguments += ["--seccomp", str(self.seccomp)]
        gid = self.uid if self.gid is None else self.gid
        drop = ["/usr/bin/setpriv", "--reuid", str(self.uid), "--regid", str(gid), "--clear-groups", "--no-new-privs"]
        drop += ["--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--"]
        return [*arguments, *drop, "/usr/bin/env", f"--chdir={self.home}", *program]

    def _write_etc(self) -> dict[str, Path]:
        """Accounts and names, without the host's."""
        if self.etc is None:
            return {}
        gid = self.uid if self.gid is None else self.gid
        self.etc.mkdir(mode=0o755, parents=True, exist_ok=True)
        files = {
            "passwd": f"root:x:0:0:root:/:/usr/sbin/nologin\nmillpond:x:{self.uid}:{gid}::{self.home}:/bin/bash\n",
            "group": f"root:x:0:\nmillpond:x:{gid}:\n",
            "hosts": "127.0.0.1 localhost\n::1 localhost\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
            "resolv.conf": "",
        }
        if self.network:  # names of the machine's network
            for name in ("hosts", "resolv.conf", "nsswitch.conf"):
                files[name] = Path("/etc", name).read_text() if Path("/etc", name).exists() else ""
        for name, text in files.items():
            (self.etc / name).write_text(text)
            (self.etc / name).chmod(0o444)
        return {name: self.etc / name for name in files}
