"""Imports the code of elements: says where it is wrong, and imports it again when its files have changed on disk."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Final, NamedTuple

from nfq_agent.elements.access import open_folder, writable_by_others

_OURS: Final = "nfq_agent"
# Seconds that the import of an element may take; less than the watchdog of the service allows. When one has taken longer, the
# next ones get little time, so that several together are bounded too.
_WITHIN: Final = 15.0
_NEXT_WITHIN: Final = 1.0
_A_WHILE: Final = 60.0
_late_until = 0.0
_DEFAULT: Final = signal.default_int_handler
# Folders in which elements are found, besides Python's own search path.
_folders: list[Path] = []


class CodeError(Exception):
    """The code of an element cannot be imported; the text says where it is wrong, and how."""


class Interrupted(KeyboardInterrupt):  # as its base
    """A person interrupts this process (Ctrl-C) while an element's code runs, which may raise KeyboardInterrupt itself."""


class _TooLongError(BaseException):
    """An import does not return. Not an `Exception`, so that `except Exception` in the imported code does not catch it."""


class _Source(NamedTuple):
    """group: what is imported again together. digest: of the file's content, None if it cannot be read."""

    group: str
    file: str
    digest: bytes | None


# What has been imported as code of elements, by the module's name.
_imported: dict[str, _Source] = {}


def look_in(folder: Path) -> None:
    """Also find modules in `folder`, after all other places. Raises CodeError if others may write to it."""
    if not folder.is_dir():
        return
    if writable_by_others(folder, folder.parent):
        raise CodeError(f"others may put code into this folder; allowed: chown root {folder}; chmod go-w {folder}")
    if folder not in _folders:
        _folders.append(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def import_object(path: str) -> object:
    """The object `package.module:Name`. Raises CodeError."""
    module, _, name = path.partition(":")
    if module.partition(".")[0] == _OURS:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise CodeError(f"{path} cannot be imported: {error}; allowed: package.module:Class") from error
    before = sys.dont_write_bytecode
    # A file that changes twice within a second would else be found in its old form (PEP 552: seconds and size).
    sys.dont_write_bytecode = True
    try:
        _refuse_what_others_write(module)
        with _bounded(), interruptible(), _guarded():
            found = getattr(importlib.import_module(module), name)
    except (CodeError, Interrupted):
        raise
    # The element's own code runs here, and may raise anything, also what is not an Exception: SystemExit, KeyboardInterrupt.
    except BaseException as error:
        raise CodeError(f"{path} cannot be imported: {where(error)}; allowed: package.module:Class") from error
    finally:
        sys.dont_write_bytecode = before
        _remember(module)
    return found


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise an exception in code that does not return: a loop, a lock, a read. C code that never returns is not interrupted."""
    global _late_until  # of the process, as its alarm is
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began = time.monotonic()
    seconds = _NEXT_WITHIN if began < _late_until else _WITHIN
    bounds = True

    def over(*_: object) -> None:
        global _late_until
        if bounds:
            _late_until = time.monotonic() + _A_WHILE
            raise _TooLongError(f"the import takes more than {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, over)
    # Repeated, for code that catches everything.
    left = interval = 0.0
    # A custom unit may not allow it.
    with contextlib.suppress(OSError):
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        try:
            yield
        finally:
            bounds = False
    finally:
        # No alarm interrupts this.
        with contextlib.suppress(OSError):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted for SIGINT, in place of KeyboardInterrupt. The agent has another handler for it, which stays."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not _DEFAULT:
        yield
        return

    def interrupt(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _DEFAULT)


def where(error: BaseException) -> str:
    """An error of an element's code as text: FILE:LINE: what is wrong."""
    text = str(error) if isinstance(error, _TooLongError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    if isinstance(error, ImportError) and error.name is not None:
        text = str(error)
    # The first frames are those of this file, and of importlib. The last one of others is where it happened.
    place, step = "", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith("<frozen ") and file not in (__file__, importlib.__file__):
            place = f"{file}:{step.tb_lineno}: "
        step = step.tb_next
    return place + text


def _refuse_what_others_write(module: str) -> None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return
    if spec is None or spec.origin is None or not spec.has_location:
        return
    origin = Path(spec.origin)
    if writable_by_others(origin, origin.parent):
        raise CodeError(_open_to_others(origin, "which holds this element"))


def _open_to_others(path: Path, what: str) -> str:
    return f"others may write to {path}, {what}; allowed: chown root {path}; chmod go-w {path}"


class _Guard:
    """Finds nothing itself, and refuses what others may write: each module in a folder of elements, its compiled form, and the
    folders of both."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raises CodeError."""
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None or not spec.has_location:
            return
        origin = Path(spec.origin)
        volume = next((folder for folder in _folders if folder in origin.parents), None)
        if volume is None:
            return
        compiled = Path(spec.cached) if spec.cached is not None else origin
        for file in (origin, compiled):
            if not file.exists():
                continue
            if writable_by_others(file, volume):
                raise CodeError(_open_to_others(file, "which an element imports"))
            if (folder := open_folder(file, volume)) is not None:
                raise CodeError(_open_to_others(folder, "which holds code of an element"))


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    guard = _Guard()
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)


def _remember(module: str) -> None:
    """Note the files of a module, of its package, and of the modules beside it in a folder of elements."""
    top = module.partition(".")[0]
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if not file or not file.endswith(".py") or name in _imported:
            continue
        folder = Path(file).parent
        if name == top or name.startswith(f"{top}."):
            group = str(folder) if folder in _folders else top
        elif folder in _folders:
            group = str(folder)
        else:
            continue
        _imported[name] = _Source(group, file, _digest(file))


def code_of(kind: type) -> str | None:
    """A short form of the file that an element's class was imported from, which another text of the file changes; None for one
    of the agent's own."""
    source = _imported.get(kind.__module__)
    return None if source is None or source.digest is None else source.digest.hex()[:8]


def _digest(file: str) -> bytes | None:
    import hashlib

    try:
        return hashlib.sha256(Path(file).read_bytes()).digest()
    except OSError:
        return None


@contextlib.contextmanager
def reimported() -> Iterator[list[str]]:
    """Within this, code of elements whose files have changed is imported again. Gives the names of the changed files.

    If what is done within this raises, the code is what it was before.
    """
    changed = {name: source for name, source in _imported.items() if _digest(source.file) != source.digest}
    groups = {source.group for source in changed.values()}
    sources = {name: source for name, source in _imported.items() if source.group in groups}
    modules = {name: sys.modules.pop(name) for name in sources if name in sys.modules}
    for name in sources:
        del _imported[name]
    importlib.invalidate_caches()
    try:
        yield sorted({source.file for source in changed.values()})
    except BaseException:
        for name in [name for name, source in _imported.items() if source.group in groups]:
            sys.modules.pop(name, None)
            del _imported[name]
        sys.modules.update(modules)
        _imported.update(sources)
        raise
