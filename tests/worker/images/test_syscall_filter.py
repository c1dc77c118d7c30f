import errno
import os
import struct
import subprocess
import sys

import pytest

from aeolian.worker.images import syscall_filter
from aeolian.worker.images.syscall_filter import ALLOW, CLONE, KILL, REFUSE, REFUSED, program


def verdict(machine, number, first_argument=0, architecture=None):
    """What the kernel would do: runs the program as seccomp(2) describes it."""
    architecture = syscall_filter.ARCHITECTURES[machine] if architecture is None else architecture
    memory = struct.pack("=iIQQ", number, architecture, 0, first_argument)
    code = [struct.unpack_from("=HBBI", program(machine), at) for at in range(0, len(program(machine)), 8)]
    at, accumulator = 0, 0
    while True:
        operation, jump_true, jump_false, k = code[at]
        at += 1
        if operation == syscall_filter.RETURN:
            return k
        if operation == syscall_filter.LOAD:
            (accumulator,) = struct.unpack_from("=I", memory, k)
            continue
        tests = {
            syscall_filter.EQUAL: accumulator == k,
            syscall_filter.ANY_BIT: accumulator & k,
            syscall_filter.AT_LEAST: accumulator >= k,
        }
        at += jump_true if tests[operation] else jump_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_reaches_the_host_is_refused_and_nothing_else(machine):
    for number in range(500):
        expected = ALLOW
        if number in REFUSED[machine].values():
            expected = REFUSE | errno.EPERM
        elif number == syscall_filter.CLONE3:
            expected = REFUSE | errno.ENOSYS
        assert verdict(machine, number) == expected, number


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_new_process_is_allowed_and_a_new_namespace_is_not(machine):
    thread, new_user, new_mount = 0x3D0F00, 0x10000000, 0x00020000
    assert verdict(machine, CLONE[machine], thread) == ALLOW
    for flag in (new_user, new_mount, new_user | thread):
        assert verdict(machine, CLONE[machine], flag) == REFUSE | errno.EPERM


def test_system_calls_of_another_kind_do_not_pass():
    assert verdict("x86_64", 165, architecture=0x40000003) == KILL
    assert verdict("x86_64", 165 | syscall_filter.X32_BIT) == REFUSE | errno.ENOSYS


def test_a_kind_of_machine_that_is_not_known_has_no_filter():
    assert program("riscv64") == b""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may set it without more")
def test_the_kernel_takes_it():
    code = (
        "import ctypes, os, subprocess, threading\n"
        "import syscall_filter; syscall_filter.install()\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.mount(b'none', b'/mnt', b'tmpfs', 0, None), ctypes.get_errno())\n"
        "print(libc.unshare(0x10000000), ctypes.get_errno())\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "print(subprocess.run(['echo', 'process'], capture_output=True, text=True).stdout.strip())"
    )
    folder = os.path.dirname(syscall_filter.__file__)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout.split("\n")[:4] == ["-1 1", "-1 1", "thread", "process"], done.stderr
