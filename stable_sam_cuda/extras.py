"""What to type where an optional package is missing."""

import json
import os
import re
import shlex
import sys
from importlib import metadata
from typing import Any
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "stable_sam_cuda"


def missing_extra(package: str, extra: str = "train") -> str:
    """One sentence: ``package`` is missing, and the command that installs what the extra needs.

    The command repeats how this package was installed: from its folder, from its URL, or, where neither is left or
    known, it names the extra's packages one by one, since no index needs to have this package.
    """
    return f"the package {package} is needed and not installed: {install_command(extra)}"


def install_command(extra: str = "train") -> str:
    """The pip command for an extra of this package."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return f"pip install '.[{extra}]' in the folder of the sources"
    source = _source(origin, extra)
    if source is None:
        source = [shlex.quote(one) for one in _packages(distribution, extra)]
    return " ".join([*_pip(), *source])


def _pip() -> list[str]:
    """pip of this interpreter, whether or not its environment is the active one."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    same = active is not None and os.path.realpath(active) == os.path.realpath(sys.prefix)
    return ["pip", "install"] if same else [shlex.quote(sys.executable), "-m", "pip", "install"]


def _source(origin: dict[str, Any], extra: str) -> list[str] | None:
    """Words for pip that name where the package came from, and the extra; None where that is unknown or gone."""
    url = origin.get("url", "")
    parts = urlsplit(url)
    local = unquote(parts.path) if parts.scheme == "file" else None
    if not url or (local is not None and not os.path.exists(local)):
        return None
    if "dir_info" in origin:
        editable = ["-e"] if origin["dir_info"].get("editable") else []
        return [*editable, shlex.quote(f"{local or url}[{extra}]")]
    version_control = origin.get("vcs_info")
    if version_control:
        url = f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    return [shlex.quote(f"{DISTRIBUTION}[{extra}] @ {url}")]


def _packages(distribution: metadata.Distribution, extra: str) -> list[str]:
    """The requirements of an extra, those of the extras that it names included."""
    wanted, own = [], re.compile(rf"{re.escape(DISTRIBUTION)}\[([\w-]+)\]", re.IGNORECASE)
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker):
            continue
        inner = own.fullmatch(requirement.strip())
        wanted += _packages(distribution, inner[1]) if inner else [requirement.strip()]
    return wanted
