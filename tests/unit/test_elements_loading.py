"""The code of elements: where it is wrong, who may write it, and that a change on disk is taken."""

from __future__ import annotations

import py_compile
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfq_agent.elements import access, loading
from nfq_agent.elements.loading import CodeError, import_object, reimported

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into a folder where elements are found; they are forgotten at the end."""
    monkeypatch.setattr(loading, "_folders", [])
    monkeypatch.setattr(loading, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "elements"
    folder.mkdir(mode=0o755)
    before = set(sys.modules)

    def put(name: str, text: str) -> Path:
        file = folder / f"{name}.py"
        file.write_text(text)
        file.chmod(0o644)
        return file

    loading.look_in(folder)
    yield put
    for name in set(sys.modules) - before:
        del sys.modules[name]


def broken(path: str) -> str:
    with pytest.raises(CodeError) as caught:
        import_object(path)
    return str(caught.value)


def test_where_the_code_is_wrong(write: Write) -> None:
    file = write("syntax", "x = 1\ny = = 2\n")
    assert f"{file}:2: SyntaxError: invalid syntax" in broken("syntax:X")
    file = write("names", "import os\n\nos.nothing_of_that_name\n")
    assert f"{file}:3: AttributeError: module 'os' has no attribute" in broken("names:X")
    file = write("leaves", "raise SystemExit(3)\n")
    assert f"{file}:1: SystemExit: 3" in broken("leaves:X")
    file = write("cancelled", "import asyncio\nraise asyncio.CancelledError('no')\n")
    assert f"{file}:2: CancelledError: no" in broken("cancelled:X")
    helper = write("helper_of_it", "def f():\n    return undefined\nf()\n")
    write("uses_it", "import helper_of_it\n")
    assert f"{helper}:2: NameError: name 'undefined' is not defined" in broken("uses_it:X")
    write("fine", "X = 1\n")
    assert "module 'fine' has no attribute 'Y'" in broken("fine:Y")
    assert "No module named 'not_there_at_all'" in broken("not_there_at_all:X")
    # What could not be imported can be once it is right.
    write("syntax", "X = 7\n")
    assert import_object("syntax:X") == 7


def test_only_a_person_interrupts(write: Write) -> None:
    file = write("interrupts", "raise KeyboardInterrupt\n")
    assert f"{file}:1: KeyboardInterrupt" in broken("interrupts:X")
    write("interrupted", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nX = 1\n")
    # What a shell starts in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            import_object("interrupted:X")
        # The agent takes the signal as a word to stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert import_object("interrupted:X") == 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_that_others_may_write_is_not_run(write: Write, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    file = write("open_to_all", f"open({str(ran)!r}, 'w').close()\nX = 1\n")
    for mode in (0o666, 0o664):
        file.chmod(mode)
        assert f"others may write to {file}" in broken("open_to_all:X")
    assert not ran.exists()
    file.chmod(0o644)
    assert import_object("open_to_all:X") == 1
    assert ran.exists()


def test_what_an_element_imports_is_refused_too_if_others_may_write_it(write: Write, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    text = f"open({str(ran)!r}, 'w').close()\nY = 1\n"
    helper = write("helper_open_to_all", text)
    write("imports_it", "from helper_open_to_all import Y as X\n")
    write("catches_it", "try:\n    import helper_open_to_all\nexcept ImportError:\n    pass\nX = 1\n")
    helper.chmod(0o666)
    for name in ("imports_it", "catches_it"):
        assert f"others may write to {helper}, which an element imports; allowed: chown root {helper}" in broken(f"{name}:X")
    assert not ran.exists()
    helper.chmod(0o644)
    assert import_object("imports_it:X") == 1


def test_a_package_whose_folder_others_may_write_is_refused(write: Write) -> None:
    package = write("any", "").parent / "in_a_package"
    package.mkdir(mode=0o755)
    (package / "__init__.py").write_text("from in_a_package.part import X\n")
    (package / "part.py").write_text("X = 1\n")
    package.chmod(0o777)
    assert f"others may write to {package}, which holds code of an element" in broken("in_a_package:X")
    package.chmod(0o755)
    (package / "part.py").chmod(0o666)
    assert f"others may write to {package / 'part.py'}, which an element imports" in broken("in_a_package:X")
    (package / "part.py").chmod(0o644)
    assert import_object("in_a_package:X") == 1


def test_compiled_code_that_others_may_write_is_refused(write: Write) -> None:
    file = write("compiled_before", "X = 1\n")
    compiled = Path(py_compile.compile(str(file), doraise=True) or "")
    for open_to_all, mode in ((compiled, 0o666), (compiled.parent, 0o777)):
        open_to_all.chmod(mode)
        assert f"others may write to {open_to_all}, which" in broken("compiled_before:X")
        open_to_all.chmod(0o755)
    assert import_object("compiled_before:X") == 1


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "elements"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(CodeError, match="others may put code into this folder"):
        loading.look_in(folder)


@pytest.mark.parametrize(
    ("options", "volume", "refused"),
    [("ro,relatime", "", False), ("rw,relatime", "", True), ("ro", "deep", True), ("ro", "..", False)],
)
def test_a_volume_that_is_mounted_read_only_is_not_writable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: str, volume: str, refused: bool
) -> None:
    folder = tmp_path / "with space"
    (folder / "deep").mkdir(parents=True)
    folder.chmod(0o777)
    table = tmp_path / "mountinfo"
    point = str(folder).replace(" ", "\\040")
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/root rw\n2 1 0:5 / {point} {options} shared:1 - tmpfs none rw\n"
                     f"3 1 0:6 / {point}er ro - tmpfs none rw\n")  # fmt: skip
    monkeypatch.setattr(access, "TABLE", str(table))
    assert access.writable_by_others(folder)
    assert access.writable_by_others(folder, folder / volume) is refused


def test_changed_code_is_taken(write: Write) -> None:
    write("helper_a", "VALUE = 1\n")
    file = write("element_a", "from helper_a import VALUE\nclass X:\n    value = VALUE\n")
    first = import_object("element_a:X")
    with reimported() as changed:
        assert changed == []
        assert import_object("element_a:X") is first
    # Of the same length, within the same second; and in what it imports.
    for number in (2, 3, 4):
        helper = write("helper_a", f"VALUE = {number}\n")
        with reimported() as changed:
            assert changed == [str(helper)]
            assert import_object("element_a:X").value == number  # type: ignore[attr-defined]  # the class above
    file.write_text(file.read_text() + "\n")
    with reimported() as changed:
        assert changed == [str(file)]
    assert not list(file.parent.glob("__pycache__"))


def test_code_that_is_worse_than_before_leaves_what_was_there(write: Write) -> None:
    write("helper_b", "VALUE = 1\n")
    file = write("element_b", "from helper_b import VALUE\nclass X:\n    value = VALUE\n")
    first = import_object("element_b:X")
    file.write_text("class X\n")
    with pytest.raises(CodeError), reimported():
        import_object("element_b:X")
    assert import_object("element_b:X") is first
    # It is still known to be changed: the next try sees it again, and takes it when it is right.
    file.write_text("class X:\n    value = 5\n")
    with reimported() as changed:
        assert changed == [str(file)]
        assert import_object("element_b:X").value == 5  # type: ignore[attr-defined]  # the class above


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("while True:\n    pass\n", (1, 2)),
        ("import time\ntime.sleep(60)\n", (2,)),
        ("import os\nos.read(os.pipe()[0], 1)\n", (2,)),
        # It catches the first.
        ("try:\n    while True:\n        pass\nexcept BaseException:\n    pass\nwhile True:\n    pass\n", (6, 7)),
    ],
)
def test_an_import_that_never_returns(write: Write, monkeypatch: pytest.MonkeyPatch, code: str, line: tuple[int, ...]) -> None:
    for name, value in (("_WITHIN", 0.8), ("_NEXT_WITHIN", 0.4), ("_late_until", 0.0)):
        monkeypatch.setattr(loading, name, value)
    before = signal.getsignal(signal.SIGALRM)
    file = write("endless", code)
    said = broken("endless:X")
    assert any(f"{file}:{each}: the import takes more than 0.8 s" in said for each in line), said
    # Another one after it gets less time.
    assert "the import takes more than 0.4 s" in broken("endless:X")
    assert signal.getsignal(signal.SIGALRM) is before
    monkeypatch.setattr(loading, "_NEXT_WITHIN", 60.0)
    write("fine", "X = 1\n")
    assert import_object("fine:X") == 1
