"""A C++ compiler that remembers: what it was asked for in the same words before, it gives again.

Engines of different tests share most of their kernels, and to compile one takes seconds. Run as the compiler itself
(see `remembering`), it tells the requests that make a library or an object of one source by the source's content and
the arguments, without the folders, which differ by engine and say nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def remembering(folder: Path, compiler: str) -> Path:
    """Write a program that is called like the compiler and keeps what it makes in a folder."""
    (folder / "kept").mkdir(parents=True, exist_ok=True)
    program = folder / Path(compiler).name
    partial = program.with_suffix(f".{os.getpid()}")
    call = f'exec "{sys.executable}" -I -S "{__file__}" "{folder / "kept"}" "{compiler}" "$@"'
    partial.write_text(f"#!/bin/sh\n{call}\n")
    partial.chmod(0o755)
    os.replace(partial, program)
    return program


def asked(arguments: list[str]) -> tuple[Path, str] | None:
    """Give what is to be written, and a digest of what was asked for; None for anything but one source's code."""
    sources = [argument for argument in arguments if argument.endswith(".cpp")]
    if len(sources) != 1 or "-o" not in arguments or "-E" in arguments or not Path(sources[0]).is_file():
        return None
    place = arguments.index("-o") + 1
    own = {Path(sources[0]).parent, Path(arguments[place]).parent}
    told = [argument for argument in arguments[:place] + arguments[place + 1 :] if argument != sources[0]]
    placeless = [Path(one).name if own & {*Path(one).parents} or one.endswith(".h") else one for one in told]
    content = Path(sources[0]).read_bytes()
    return Path(arguments[place]), hashlib.sha256(repr(placeless).encode() + content).hexdigest()


def main(kept: Path, compiler: str, arguments: list[str]) -> int:
    request = asked(arguments)
    if request is None:
        return subprocess.run([compiler, *arguments]).returncode
    target, digest = request
    if (kept / digest).exists():
        shutil.copyfile(kept / digest, target)
        target.chmod(0o755)
        return 0
    status = subprocess.run([compiler, *arguments]).returncode
    if status == 0:
        with tempfile.NamedTemporaryFile(dir=kept, delete=False) as copy:
            copy.write(target.read_bytes())
        os.replace(copy.name, kept / digest)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
