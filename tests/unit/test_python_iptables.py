"""What of python-iptables is replaced: its way to find libraries, and its layout of libxtables' options."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import types
from typing import Any

import pytest

from nfq_agent.host.xtables import python_iptables


def test_the_longer_layout_of_libxtables_is_walked_in_its_own_steps() -> None:
    """As Debian 13 has it, without Debian 13: an array of the longer entries."""
    iptc = python_iptables.import_iptc()  # what python-iptables is given to do
    real = sys.modules["iptc.xtables"]
    longer: Any = type("Longer", (ctypes.Structure,), {"_fields_": (*real.xt_option_entry._fields_, ("base", ctypes.c_uint))})
    table = (longer * 4)(longer(b"one", base=7), longer(b"two", id=2, flags=real.XTOPT_MAND), longer(b"three"))
    there = types.SimpleNamespace(xtables=types.SimpleNamespace(xt_option_entry=real.xt_option_entry))
    methods = {name: real.xtables.__dict__[name] for name in ("_option_lookup", "_options_fcheck")}
    there.xtables.xtables = type("xtables", (), methods)
    first = ctypes.cast(table, ctypes.POINTER(real.xt_option_entry))
    walker = there.xtables.xtables()
    if not python_iptables._new_layout():  # noqa: SLF001  # what python-iptables is given to do
        python_iptables._mend(there)  # noqa: SLF001  # what python-iptables is given to do
    assert walker._option_lookup(first, b"three").name == b"three"  # noqa: SLF001  # what python-iptables is given to do
    assert walker._option_lookup(first, b"two").id == 2  # noqa: SLF001  # what python-iptables is given to do
    assert walker._option_lookup(first, b"four") is None  # noqa: SLF001  # what python-iptables is given to do
    walker._options_fcheck(b"name", 1 << 2, first)  # noqa: SLF001  # what python-iptables is given to do
    with pytest.raises(iptc.errors.XTablesError, match="must be specified"):
        walker._options_fcheck(b"name", 0, first)  # noqa: SLF001  # what python-iptables is given to do


def test_python_iptables_is_imported_without_starting_anything() -> None:
    """Left alone it runs ldconfig, the compiler and modprobe, for 0.1 to 0.2 s."""
    program = f"""
import sys; sys.path[:0] = {sys.path!r}
from nfq_agent.host.xtables import python_iptables
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system") and "modprobe" not in str(arguments):
        raise SystemExit(f"{{event}} {{arguments}}")
sys.addaudithook(refuse)
python_iptables.import_iptc()
print(sys.modules["iptc.xtables"]._xtables_libdir)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert os.path.exists(os.path.join(done.stdout.strip(), "libxt_NFQUEUE.so"))
