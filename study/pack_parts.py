"""Files in tar archives of a bounded size, each with a manifest that holds its checksum.

``part-00.tar``, ``part-01.tar``, ... and beside each ``part-00.json``: its SHA-256, how many parts belong together, and
a name for the whole, ``pack``, which is the digest of all parts. The same files give the same bytes on every machine.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from stable_sam_cuda.files import atomic_write, save_bytes

FORMAT, VERSION = "stable_sam_cuda.pack", 1
BLOCK = tarfile.BLOCKSIZE
PADDING = tarfile.RECORDSIZE  # the end of an archive takes at most so many bytes


def write_parts(files: Iterable[tuple[str, bytes]], out: Path, part_bytes: int) -> list[Path]:
    """Write ``files``, names and contents, in their order into parts of at most ``part_bytes``; the parts' paths.

    Each part appears whole or not at all; manifests come last, so that parts without one are of a run that broke off.

    Raises:
        ValueError: ``out`` holds parts already, or a file alone is larger than a part.
        OSError: ``out`` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if before := sorted(out.glob("part-*")):
        raise ValueError(f"out: expected a folder without parts, got {out} with {before[0].name}")
    paths = []
    for index, members in enumerate(_grouped(files, part_bytes)):
        paths.append(out / f"part-{index:02d}.tar")
        write_tar(members, paths[-1])
    sums = [_sha256(path) for path in paths]
    common = {"format": FORMAT, "version": VERSION, "pack": _pack_name(sums), "parts": len(paths)}
    for index, (path, digest) in enumerate(zip(paths, sums, strict=True)):
        manifest = {**common, "part": index, "file": path.name, "bytes": path.stat().st_size, "sha256": digest}
        save_bytes(path.with_suffix(".json"), json.dumps(manifest, indent=1).encode())
    return paths


def write_tar(files: Iterable[tuple[str, bytes]], path: Path) -> None:
    """Write names and contents into an archive that appears whole or not at all."""
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)  # its owner, time and mode are the same everywhere
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _grouped(files: Iterable[tuple[str, bytes]], part_bytes: int) -> Iterator[list[tuple[str, bytes]]]:
    group: list[tuple[str, bytes]] = []
    used = 0
    for name, content in files:
        # A name that does not fit into a header takes a header of its own.
        headers = BLOCK if len(name.encode()) <= tarfile.LENGTH_NAME and name.isascii() else 4 * BLOCK
        size = headers + -(-len(content) // BLOCK) * BLOCK
        if size + PADDING > part_bytes:
            raise ValueError(
                f"part-mib: expected parts that hold every file, got {part_bytes / 2**20:g} MiB a part, "
                f"and {name} takes {(size + PADDING) / 2**20:.3g}"
            )
        if group and used + size + PADDING > part_bytes:
            yield group
            group, used = [], 0
        group.append((name, content))
        used += size
    if group:
        yield group


def read_parts(folder: Path, allowed: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """The files of all parts in ``folder``; nothing is given before every part has been checked.

    Args:
        allowed: whether a name may occur.

    Raises:
        ValueError: there are no parts; one is missing, damaged or of another pack; or a member is no plain file below
            the folder it will be unpacked to, or has a name that is not ``allowed``.
    """
    paths = _checked_parts(folder)
    for path in paths:
        check_members(path, allowed)
    for path in paths:
        yield from read_tar(path)


def check_members(path: Path, allowed: Callable[[str], bool] = lambda name: True) -> None:
    """
    Raises:
        ValueError: a member of the archive is not as `read_parts` has it.
    """
    with tarfile.open(path) as tar:
        for member in tar:
            if not (member.isfile() and _stays_below(member.name) and allowed(member.name)):
                raise ValueError(f"unpack: expected plain files named as in a pack, got {member.name!r} in {path}")


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive whose members were checked before."""
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            yield member.name, content.read() if content else b""


def _stays_below(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name


def _checked_parts(folder: Path) -> list[Path]:
    """The tar files of a whole pack, in their order."""
    manifests = sorted(map(_manifest, folder.glob("part-*.json")), key=lambda manifest: manifest["part"])
    if not manifests:
        raise ValueError(f"unpack: expected part-00.json and its like in {folder}, found none")
    packs = {manifest["pack"] for manifest in manifests}
    if len(packs) > 1:
        raise ValueError(f"unpack: expected parts of one pack in {folder}, got parts of {len(packs)}")
    count, indexes = manifests[0]["parts"], [manifest["part"] for manifest in manifests]
    paths = [folder / f"part-{index:02d}.tar" for index in range(count)]
    missing = [path.name for path in paths if not path.is_file()]
    missing += [f"part-{index:02d}.json" for index in range(count) if index not in indexes]
    if missing:
        raise ValueError(f"unpack: expected {count} parts in {folder}, missing are {', '.join(missing)}")
    sums = [manifest["sha256"] for manifest in manifests]
    if indexes != list(range(count)) or _pack_name(sums) not in packs:
        raise ValueError(f"unpack: expected the {count} manifests of one pack in {folder}, got ones that were changed")
    for wanted, path in zip(sums, paths, strict=True):
        found = _sha256(path)
        if found != wanted:
            raise ValueError(f"unpack: expected SHA-256 {wanted} of {path}, got {found}")
    return paths


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"unpack: expected a manifest in {path}, got a damaged file: {error}") from error
    found = {name: manifest.get(name) for name in ("format", "version")} if isinstance(manifest, dict) else manifest
    if found != {"format": FORMAT, "version": VERSION}:
        raise ValueError(f"unpack: expected a manifest of {FORMAT}, version {VERSION}, in {path}, got {found}")
    kinds = {"part": int, "parts": int, "pack": str, "sha256": str}
    if not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"unpack: expected {', '.join(kinds)} in {path}, got {sorted(manifest)}")
    return manifest


def _pack_name(sums: list[str]) -> str:
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
