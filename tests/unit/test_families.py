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
