"""llama.cpp's own converter from checkpoints to GGUF: where it is, how it is fetched, how it is called.

The converter is a script with its own modules (convert_hf_to_gguf.py, conversion/, gguf-py/) and is in no wheel: the
source archive of the package llama-cpp-python carries it. `fetch` takes it from there, one version, whose hash is
checked; `--converter` names another one, as that of a clone of llama.cpp.

    convert(find_converter(None), checkpoint, Path("model.gguf"), "f16")
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from layerscalpel.errors import UserError
from layerscalpel.progress import waiting

PACKAGE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of the source archive of that version."""
SCRIPT = "convert_hf_to_gguf.py"
INSIDE = "vendor/llama.cpp/"
WANTED = (SCRIPT, "LICENSE", "conversion/", "gguf-py/gguf/")
"""What is taken of the archive."""
GET = "get it: scalpel export gguf DIR --get-converter, or name a clone of llama.cpp: --converter FOLDER"
OWN_WORDS = {
    "is not supported": "llama.cpp's converter does not know the architecture {what}: there is no GGUF of it yet"
    " - serve the checkpoint with transformers or vLLM",
    "BPE pre-tokenizer was not recognized": "llama.cpp's converter does not know how this tokenizer splits words"
    " - use the tokenizer files of the model it was made from, unchanged",
}
"""{what the converter says: our sentence}."""


def home() -> Path:
    """Return where a fetched converter is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "layerscalpel" / PACKAGE.replace("==", "-")


def find_converter(given: str | None) -> Path:
    """Return the converter's script: the named one, or the one that was fetched.

    Args:
        given: the script, or a folder that holds it; None looks where `fetch` puts it.

    Raises:
        UserError: it is not there.
    """
    place = Path(given).expanduser() if given else home()
    script = place / SCRIPT if place.is_dir() else place
    if script.is_file() and (script.name == SCRIPT) and (script.parent / "conversion").is_dir():
        return script
    if given:
        raise UserError(
            f"{given} holds no {SCRIPT} with its folder conversion/ - allowed: a clone of llama.cpp - {GET}"
        )
    raise UserError(f"llama.cpp's converter is not here ({home()}) - {GET}")


def fetch() -> Path:
    """Fetch the converter by pip, once, and return its script.

    Raises:
        UserError: pip cannot fetch the archive, or it is not the one we know.
    """
    with contextlib.suppress(UserError):
        return find_converter(None)
    folder = home()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, waiting(f"fetching {PACKAGE}, source archive"):
        name = PACKAGE.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name]
        done = subprocess.run([*command, "--dest", scratch, PACKAGE], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"pip could not fetch {PACKAGE} ({last_line(done.stderr)}) - name a clone: --converter FOLDER"
            )
        archive = next(Path(scratch).glob("*.tar.gz"))
        unpack(archive, Path(scratch) / "out", SHA256)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(scratch) / "out", folder)
    return find_converter(None)


def unpack(archive: Path, folder: Path, sha256: str) -> None:
    """Take the converter out of a source archive.

    Raises:
        UserError: the archive has another hash.
    """
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != sha256:
        raise UserError(
            f"{archive.name} has the hash {found[:12]}..., not {sha256[:12]}... as published"
            " - what it holds would be run, so it is not used; name a clone of llama.cpp: --converter FOLDER"
        )
    with tarfile.open(archive) as packed:
        for member in packed:
            path = member.name.partition("/")[2]
            if path.startswith(INSIDE) and path.removeprefix(INSIDE).startswith(WANTED) and member.isfile():
                member.name = path.removeprefix(INSIDE)
                packed.extract(member, folder, filter="data")


def command_of(script: Path, checkpoint: Path, out: Path, outtype: str) -> list[str]:
    """Return the command that converts."""
    return [sys.executable, str(script), str(checkpoint), "--outtype", outtype, "--outfile", str(out)]


def convert(script: Path, checkpoint: Path, out: Path, outtype: str) -> None:
    """Write a GGUF of a checkpoint.

    Raises:
        UserError: the converter refuses it, or fails.
    """
    clean = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    command = command_of(script, checkpoint, out, outtype)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | clean)
    if done.returncode or not out.is_file():
        raise UserError(_why(done.stderr, checkpoint))


def _why(said: str, checkpoint: Path) -> str:
    """Return the sentence for what the converter said when it failed."""
    for words, sentence in OWN_WORDS.items():
        if line := next((line for line in said.splitlines() if words in line), None):
            return sentence.format(what=_subject(line, words))
    return (
        f"llama.cpp's converter failed on {checkpoint} ({last_line(said)})"
        " - try a newer clone of llama.cpp: --converter FOLDER"
    )


def _subject(line: str, words: str) -> str:
    """Return the word that stands before what was said, as the architecture's name; else the words themselves."""
    before = line.partition(words)[0].replace(":", " ").split()
    return before[-1] if before else words


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
