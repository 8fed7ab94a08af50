"""A library without its unwinding tables: it is loaded, and its errors are exceptions as before."""

from __future__ import annotations

import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pydantic_core
import pytest
from packaged import program

without = program("without-unwinding")
_LIBRARY = next(Path(pydantic_core.__file__).parent.glob("_pydantic_core*.so"))
_ASKED = """
import pydantic
class Model(pydantic.BaseModel):
    number: int
print(pydantic.__file__, pydantic_core.__file__, Model(number="1"))
try:
    Model(number="x")
except pydantic.ValidationError as error:
    print(error.error_count())
"""


def test_the_sections_are_those_of_readelf() -> None:
    listed = subprocess.run(["readelf", "--sections", "--wide", str(_LIBRARY)], check=True, capture_output=True, text=True).stdout
    found = {name.decode(): (place, length) for name, place, length in without.sections(_LIBRARY.read_bytes())}
    for name in (".eh_frame_hdr", ".eh_frame", ".gcc_except_table", ".text"):
        (line,) = [line.split("]", 1)[1].split() for line in listed.splitlines() if f" {name} " in line]
        assert found[name] == (int(line[3], 16), int(line[4], 16))


def test_only_these_sections_are_cleared() -> None:
    before = _LIBRARY.read_bytes()
    after = without.cleared(before)
    assert len(after) == len(before)
    at = 0
    for name, place, length in sorted(without.sections(before), key=lambda section: section[1]):
        if name in without.SECTIONS:
            assert after[at:place] == before[at:place]
            assert after[place : place + length] == bytes(length)
            at = place + length
    assert after[at:] == before[at:]
    tables = b"".join(
        before[place : place + length] for name, place, length in without.sections(before) if name in without.SECTIONS
    )
    assert len(lzma.compress(tables)) > 100_000


def test_errors_are_exceptions_as_before(tmp_path: Path) -> None:
    shutil.copytree(_LIBRARY.parent, tmp_path / "pydantic_core")
    copy = tmp_path / "pydantic_core" / _LIBRARY.name
    copy.write_bytes(without.cleared(copy.read_bytes()))
    text = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pydantic_core\n{_ASKED}"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert str(tmp_path) in said[0]
    assert said[0].endswith("number=1")
    assert said[1] == "1"


@pytest.mark.parametrize("library", [b"", b"\x7fELF\x01\x01", b"#!/bin/sh"])
def test_what_is_no_library_is_refused(library: bytes) -> None:
    with pytest.raises(ValueError, match="ELF"):
        list(without.sections(library))
