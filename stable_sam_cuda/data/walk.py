"""A tree of folders as it lies on disk: every real folder once, whatever links lead to it."""

import heapq
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stable_sam_cuda.notes import note, printable

# Made by systems and tools beside the user's own; their content only looks like data.
SYSTEM_NAMES = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini")
)


@dataclass
class Folder:
    """A folder with its visible files and folders, by name in ascending order.

    ``again`` are links to folders that are elsewhere in the tree.
    """

    path: Path
    files: list[str] = field(default_factory=list)
    folders: dict[str, "Folder"] = field(default_factory=dict)
    again: dict[str, "Folder"] = field(default_factory=dict)

    def child(self, name: str) -> "Folder | None":
        """The folder of this name; else the one whose name differs in upper and lower case only, if it is one."""
        return _named(self.folders, name)

    def child_or_link(self, name: str) -> "Folder | None":
        """The same, links to folders elsewhere in the tree included."""
        return _named({**self.again, **self.folders}, name)

    def below(self) -> Iterator["Folder"]:
        """This folder and all below it, parents first, in the order of their names."""
        waiting = [self]
        while waiting:
            folder = waiting.pop()
            yield folder
            waiting += [folder.folders[name] for name in sorted(folder.folders, reverse=True)]


Link = tuple[int, str, str, Folder]  # number of steps, path, name, the folder that it is in: in the order of their turn


def _named(folders: dict[str, Folder], name: str) -> Folder | None:
    if name in folders:
        return folders[name]
    alike = [one for one in folders if one.lower() == name.lower()]
    return folders[alike[0]] if len(alike) == 1 else None


def walk(root: Path) -> Folder:
    """The tree below ``root``. Links are followed, but each real folder is there once.

    A folder that is reached without a link keeps that place; of several links to one folder the one of the fewest
    steps does, then the first by name. What is left out is noted by reason, with its number and an example: hidden
    and system files and folders, dangling links, links to folders that are there already, folders that cannot be
    listed.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    left_out: dict[str, list[str]] = {}
    tree = Folder(root)
    known = {_identity(os.stat(root)): tree}
    links: list[Link] = []
    _list(tree, known, links, left_out, is_root=True)
    while links:
        # The plainest that is left: a followed link may have shown more of them.
        *_, name, parent = heapq.heappop(links)
        try:
            identity = _identity(os.stat(parent.path / name))
        except OSError:
            left_out.setdefault("links that lead nowhere", []).append(printable(parent.path / name))
            continue
        if identity in known:
            parent.again[name] = known[identity]
            left_out.setdefault("links to folders that are used under another name", []).append(
                printable(parent.path / name)
            )
            continue
        parent.folders[name] = known[identity] = Folder(parent.path / name)
        _list(parent.folders[name], known, links, left_out)
    for reason, subjects in left_out.items():
        note(f"{reason} are left out: {len(subjects)}, the first is this one", min(subjects))
    return tree


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _list(
    folder: Folder,
    known: dict[tuple[int, int], Folder],
    links: list[Link],
    left_out: dict[str, list[str]],
    is_root: bool = False,
) -> None:
    """Fill ``folder`` and all below it that no link leads to; put its links to folders into ``links``."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here.path) as scan:
                names = sorted((entry.name, entry.is_symlink()) for entry in scan)
        except OSError as error:
            if is_root and here is folder:
                raise
            reason = f"folders that cannot be listed ({error.strerror or error})"
            left_out.setdefault(reason, []).append(printable(here.path))
            continue
        for name, is_link in names:
            path = here.path / name
            if name.startswith(".") or name.lower() in SYSTEM_NAMES:
                left_out.setdefault("hidden and system files and folders", []).append(printable(path))
                continue
            try:
                found = os.stat(path)
            except OSError:
                reason = "links that lead nowhere" if is_link else "files and folders that cannot be reached"
                left_out.setdefault(reason, []).append(printable(path))
                continue
            if stat.S_ISREG(found.st_mode):
                here.files.append(name)
            elif not stat.S_ISDIR(found.st_mode):
                left_out.setdefault("devices, pipes and sockets", []).append(printable(path))
            elif is_link:
                heapq.heappush(links, (len(path.parts), str(path), name, here))
            elif _identity(found) in known:
                left_out.setdefault("folders that are used under another name", []).append(printable(path))
            else:
                here.folders[name] = known[_identity(found)] = Folder(path)
                waiting.append(here.folders[name])
