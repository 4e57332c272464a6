"""Linking for the C library of manylinux_2_28, torch's own choice, on a system with a newer one.

A program asks for the versions of functions that stood in the library it was linked with. glibc
2.34 moved threads and dlopen into libc under new versions, 2.29 gave ``exp`` and ``log`` new ones;
the old ones stay for ever. So the linker is shown libraries that hold names alone, in their old
versions and old places, before the system's. What GCC's newer headers want besides is in
newer_gcc.cpp.

On a system that is as old as that nothing changes. auditwheel has the last word either way.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: The version that everything had at first, by machine.
FIRST = {"x86_64": "GLIBC_2.2.5", "aarch64": "GLIBC_2.17"}
#: What has a version beyond glibc 2.28, of all that our sources and CUDA's static runtime use, and
#: where it stood. On x86-64 one came later than the rest.
NAMES = {
    "libm.so.6": "exp log",
    "libdl.so.2": "dlclose dlerror dlmopen@GLIBC_2.3.4 dlopen dlsym dlvsym",
    "librt.so.1": "shm_open shm_unlink",
    "libpthread.so.0": """
        pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
        pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock
        pthread_mutexattr_destroy pthread_mutexattr_init pthread_mutexattr_setpshared
        pthread_mutexattr_settype pthread_once pthread_rwlock_destroy pthread_rwlock_init
        pthread_rwlock_rdlock pthread_rwlock_timedrdlock pthread_rwlock_timedwrlock
        pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
        pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
        pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
        pthread_spin_lock pthread_spin_trylock pthread_spin_unlock sem_destroy sem_init sem_post
        sem_timedwait sem_trywait sem_wait""",
}


def flags(folder: Path, machine: str = "", compiler: Sequence[str] = ()) -> str:
    """What to link first, in words that g++ and nvcc share; the files go into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = machine or os.uname().machine
    compiler = compiler or shlex.split(os.environ.get("CXX", "g++"))
    newer = folder / "newer_gcc.o"
    source = HERE / "newer_gcc.cpp"
    subprocess.run([*compiler, "-O2", "-fPIC", "-c", str(source), "-o", str(newer)], check=True)
    libraries = [_names_alone(folder, soname, machine, compiler) for soname in NAMES]
    inputs = shlex.join(map(str, [newer, *libraries]))
    # Some linkers forget libraries of which nothing was wanted yet; CUDA's runtime comes last.
    return f"-Xlinker --no-as-needed {inputs}"


def versions(soname: str, machine: str) -> dict[str, list[str]]:
    """The names of a library by the version that they are to be asked for in."""
    by_version: dict[str, list[str]] = {}
    for name in NAMES[soname].split():
        name, _, version = name.partition("@")
        own = version if version and machine == "x86_64" else FIRST[machine]
        by_version.setdefault(own, []).append(name)
    return by_version


def _names_alone(folder: Path, soname: str, machine: str, compiler: Sequence[str]) -> Path:
    """A shared library without code that the linker takes for the old one."""
    by_version = versions(soname, machine)
    library = folder / f"{soname.split('.')[0]}_of_2_28.so"
    script, source = library.with_suffix(".map"), library.with_suffix(".c")
    lines = [f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in by_version.items()]
    script.write_text("".join(lines))
    names = [name for names in by_version.values() for name in names]
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    command = [*compiler, "-x", "c", "-w", "-fno-builtin", "-fPIC", "-shared", "-nostdlib"]
    command += [f"-Wl,-soname,{soname}", f"-Wl,--version-script,{script}"]
    subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library
