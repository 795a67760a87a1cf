"""The system calls that a workspace may not make, as a classic BPF program for bubblewrap's `--seccomp`.

What is not named is allowed: notebooks run arbitrary scientific code. What is named has no use there and is how sandboxes
have been left: other namespaces, mounts, kernel keyrings, BPF, performance counters, debugging, raw sockets. The default
profile of Docker (moby/profiles) names nearly the same calls. Another architecture's system calls end the process.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys

from millpond.store.errors import InvalidInput

_LOAD, _JEQ, _JSET, _JGE, _AND, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

CALLS: dict[str, tuple[int, int]] = {
    # name: number on x86_64, on aarch64 (-1: does not exist there)
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "create_module": (174, -1),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_kernel_syms": (177, -1),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, -1),
    "iopl": (172, -1),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "memfd_secret": (447, 447),
    "modify_ldt": (154, -1),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, -1),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, -1),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, -1),
    "userfaultfd": (323, 282),
    "ustat": (136, -1),
    "vhangup": (153, 58),
}
"""Refused with EPERM whatever their arguments are."""

_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_SOCKET = {"x86_64": 41, "aarch64": 198}
_IOCTL = {"x86_64": 16, "aarch64": 29}
NAMESPACES = 0x7E020080  # CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NETLINK, _NETLINK_ROUTE = 16, 0  # libzmq lists the interfaces with it; nothing can be changed without a capability
_SOCK_TYPE_MASK, _RAW, _PACKET = 0xF, 3, 10
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_X32_BIT = 0x40000000


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _if(code: int, value: int, yes: int, no: int) -> bytes:
    """Skip `yes` statements when the comparison holds and `no` when it does not."""
    return struct.pack("=HBBI", code, yes, no, value)


def _refuse(number: int) -> bytes:
    return _statement(_RETURN, _ERRNO | number)


def _argument(position: int) -> bytes:
    """Load the low half of an argument; both architectures are little-endian."""
    return _statement(_LOAD, _ARGUMENTS + 8 * position)


def program(machine: str | None = None) -> bytes:
    """The filter, an array of `struct sock_filter`; raises InvalidInput for an architecture whose numbers are not known."""
    machine = platform.machine() if machine is None else machine
    if machine not in AUDIT_ARCH or sys.byteorder != "little":
        raise InvalidInput(f"no system-call filter for {machine!r}; workspaces run on {', '.join(AUDIT_ARCH)}")
    column = list(AUDIT_ARCH).index(machine)
    parts = [
        _statement(_LOAD, _ARCH),
        _if(_JEQ, AUDIT_ARCH[machine], 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        parts += [_if(_JGE, _X32_BIT, 0, 1), _statement(_RETURN, _KILL)]
    for numbers in CALLS.values():
        if numbers[column] >= 0:
            parts += [_if(_JEQ, numbers[column], 0, 1), _refuse(errno.EPERM)]
    # its flags lie in memory, where a filter cannot look: the C library falls back to clone
    parts += [_if(_JEQ, _CLONE3, 0, 1), _refuse(errno.ENOSYS)]
    clone = [_argument(0), _if(_JSET, NAMESPACES, 0, 1), _refuse(errno.EPERM), _statement(_RETURN, _ALLOW)]
    route = [
        _argument(0),
        _if(_JEQ, _NETLINK, 0, 4),
        _argument(2),
        _if(_JEQ, _NETLINK_ROUTE, 0, 1),
        _statement(_RETURN, _ALLOW),
        _refuse(errno.EAFNOSUPPORT),
    ]
    family = [*route, *(_if(_JEQ, known, len(_FAMILIES) - place, 0) for place, known in enumerate(_FAMILIES))]
    kind = [
        _argument(1),
        _statement(_AND, _SOCK_TYPE_MASK),
        _if(_JEQ, _RAW, 1, 0),
        _if(_JEQ, _PACKET, 0, 1),
        _refuse(errno.EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    sockets = [*family, _refuse(errno.EAFNOSUPPORT), *kind]
    terminal = [
        _argument(1),
        _if(_JEQ, _TIOCSTI, 1, 0),
        _if(_JEQ, _TIOCLINUX, 0, 1),
        _refuse(errno.EPERM),
        _statement(_RETURN, _ALLOW),
    ]
    for number, block in ((_CLONE[machine], clone), (_SOCKET[machine], sockets), (_IOCTL[machine], terminal)):
        parts += [_if(_JEQ, number, 0, len(block)), *block]
    return b"".join([*parts, _statement(_RETURN, _ALLOW)])
