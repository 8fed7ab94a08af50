"""The families of IP of a kernel: what cannot be asked now is not taken for what is not there."""

from __future__ import annotations

import subprocess
import sys

# The next socket cannot be opened: there is no free descriptor. Then one can.
_SHORT = """
import os, resource
from nfq_agent.host.families import families
free = os.open(os.devnull, os.O_RDONLY)
os.close(free)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
short = families()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(*short, "then", *families())
"""


def test_without_a_free_descriptor_a_family_is_not_taken_for_one_that_the_kernel_lacks() -> None:
    said = subprocess.run([sys.executable, "-c", _SHORT], check=True, capture_output=True, text=True).stdout
    short, then = said.split("then")
    assert short.split() == ["inet", "inet6"]
    assert "inet" in then.split()


# As RestrictAddressFamilies=AF_NETLINK AF_UNIX of systemd.exec(5): a socket of IP is EAFNOSUPPORT. (linux/filter.h: load a word,
# jump if equal, return; linux/seccomp.h: the number of the call is at 0, its first argument at 16.)
_RESTRICTED = """
import errno, socket, struct
from nfq_agent.host import families as module
from nfq_agent.host.families import families
from nfq_agent.host.jail import seccomp
from nfq_agent.host.jail.syscalls import this_architecture
LOAD, EQUAL, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000
program = (
    (LOAD, 0, 0, 0), (EQUAL, 0, 4, this_architecture().numbers["socket"]),
    (LOAD, 0, 0, 16), (EQUAL, 1, 0, socket.AF_INET), (EQUAL, 0, 1, socket.AF_INET6),
    (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT), (RETURN, 0, 0, ALLOW),
)
before = families()
module._is_spoken.cache_clear()
seccomp.no_new_privileges()
seccomp.load(b"".join(struct.pack("=HBBI", *each) for each in program))
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
except OSError as error:
    assert error.errno == errno.EAFNOSUPPORT
else:
    raise SystemExit("the filter is not in force")
print(*before, "then", *families())
"""


def test_a_unit_that_allows_no_ip_sockets_is_not_taken_for_a_kernel_without_ip() -> None:
    """It is the drop-in owned.conf: no rule was made, and all traffic passed uninspected."""
    said = subprocess.run([sys.executable, "-c", _RESTRICTED], check=True, capture_output=True, text=True).stdout
    before, then = said.split("then")
    assert "inet" in then.split()
    assert then.split() == before.split()
