"""Compiles the kernels for CPUs for this machine, once: the library is kept in the user's cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
DIGEST = hashlib.sha256().digest_size  # bytes behind the library, the hash of those before
log = logging.getLogger(__name__)


def built(flags: tuple[str, ...]) -> Path:
    """The compiled library. flags: further ones. Raises OSError where there is no compiler, SubprocessError with its
    first error where it fails."""
    _share_openmp()
    compiler = _compiler()
    flags = (*FLAGS, *flags)
    told = "\n".join(
        (*(file.read_text() for file in sorted(SOURCES.iterdir())), *compiler, *flags, platform.machine(), features())
    )
    name = f"kernels-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("CALIDROP_CACHE") or platformdirs.user_cache_dir("calidrop"))
    if not _whole(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f".{name}.lock"):
            if not _whole(folder / name):
                log.warning("Compiling calidrop's kernels for this CPU (once, 10 to 60 s)")
                _compile(compiler, flags, folder / name)
    return folder / name


def _compiler() -> list[str]:
    """A program and its arguments. Raises OSError where there is none."""
    wish = os.environ.get("CXX", "")
    try:
        words = shlex.split(wish)
    except ValueError as error:
        raise OSError(f"CXX={wish}: {error}") from error
    if words and shutil.which(words[0]) is None:
        raise OSError(f"CXX={wish}: there is no program {words[0]}")
    found = words or [x for x in (shutil.which("g++") or shutil.which("clang++"),) if x]
    if not found:
        raise OSError("no C++ compiler (g++ or clang++)")
    return found


def _whole(library: Path) -> bool:
    """Whether it is there as it was written. Loading one that was cut short kills the process (SIGBUS)."""
    try:
        data = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One of several processes that start at once; all of them where the file system knows no locks."""
    own = FileLock(lock)
    try:
        own.acquire()
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        own.release()


def _compile(compiler: list[str], flags: tuple[str, ...], to: Path) -> None:
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".compiling-") as temporary:
        made = Path(temporary) / to.name
        # not linked with a runtime of its own: two of them in one process fight for the cores
        one = functools.partial(_compiled, compiler, ("-c", *flags), Path(temporary))
        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(one, sorted(SOURCES.glob("*.cpp"))))
        _run([*compiler, "-shared", *objects, "-o", str(made)])
        with made.open("ab") as file:  # loaders do not look behind the end
            file.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, to)


def _compiled(compiler: list[str], flags: tuple[str, ...], folder: Path, source: Path) -> str:
    to = str(folder / f"{source.stem}.o")
    _run([*compiler, *flags, str(source), "-o", to])
    return to


def _run(command: list[str]) -> None:
    """Raises SubprocessError with what the compiler said first of what is wrong, else with the last it said."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        wrong = [line for line in said if "error" in line.lower()] + said[-1:] + [f"exit status {done.returncode}"]
        raise subprocess.SubprocessError(f"{command[0]} failed: {wrong[0]}")


@functools.cache
def features() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def of_amd() -> bool:
    """Whether the processor is one of AMD's, on which MKL and torch's attention do without AVX-512."""
    return "sse4a" in features().split()


def _share_openmp() -> None:
    """Let the kernel find the OpenMP runtime that torch runs on. Raises OSError where that is not known."""
    try:
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    except OSError:
        paths = set()
    runtimes = sorted(p for p in paths if any(n in Path(p).name for n in ("libgomp", "libiomp", "libomp")))
    if not runtimes:
        raise OSError("torch's OpenMP runtime was not found")
    # torch's own, where another library brought a second one
    ctypes.CDLL(next((p for p in runtimes if "torch" in p), runtimes[0]), mode=ctypes.RTLD_GLOBAL)
