"""``stable-sam doctor``: what this machine and installation can do, and why not more."""

import json
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
import typer
from rich.table import Table
from rich.text import Text

from stable_sam_cuda import backends
from stable_sam_cuda.cli.console import table_lines, write
from stable_sam_cuda.cli.errors import explain_user_errors
from stable_sam_cuda.cli.machine import build_tools, cuda_devices, machine_facts, package_versions
from stable_sam_cuda.modules.attention import choose_path
from stable_sam_cuda.notes import printable
from stable_sam_cuda.ops import libraries
from stable_sam_cuda.sam.download import REMOTE_CHECKPOINTS, checkpoint_folder
from stable_sam_cuda.sam.lite import SHIPPED_CHECKPOINT
from stable_sam_cuda.sam.plugin_io import shipped_plugins

T = TypeVar("T")


def backend_states() -> dict[str, dict[str, Any]]:
    """Backend -> whether it is available on any device, and why not; of those for GPUs, the same for each GPU."""
    names = [member for member in backends.Backend if member is not backends.Backend.AUTO]
    states = {member.value: state_of(backends.why_unavailable(member)) for member in names}
    for member in (backends.Backend.CUDA, backends.Backend.TRITON):
        devices = {name: backends.why_unavailable(member, torch.device(name)) for name in gpu_names()}
        states[member.value]["devices"] = {name: state_of(reason) for name, reason in devices.items()}
    return states


def state_of(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def gpu_names() -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def per_device(choose: Callable[[torch.device], T]) -> dict[str, T | None]:
    """Device, of several GPUs each -> what is chosen there; ``cuda`` -> None where there is no GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", backends.MissingBackendWarning)  # the table says the same
        chosen: dict[str, T | None] = {name: choose(torch.device(name)) for name in ("cpu", *gpu_names())}
    return chosen if gpu_names() else chosen | {"cuda": None}


def auto_choices() -> dict[str, str | None]:
    """Device -> the backend that ``auto`` takes for float32 there."""
    return per_device(lambda device: backends.choose("auto", device, torch.float32).value)


def attention_paths() -> dict[str, dict[str, str] | None]:
    """Device -> the path of the plugin's attention there, for inference and for training."""
    uses = {"inference": False, "training": True}
    return per_device(
        lambda device: {
            use: choose_path("auto", device, torch.float32, gradients=gradients).value
            for use, gradients in uses.items()
        }
    )


def weight_states() -> dict[str, dict[str, Any]]:
    """Base model -> where its weights are looked up, and whether they are there."""
    states = {"sam_lite": {"path": printable(SHIPPED_CHECKPOINT), "found": SHIPPED_CHECKPOINT.is_file()}}
    for name, remote in REMOTE_CHECKPOINTS.items():
        try:
            path = checkpoint_folder() / remote.file_name
        except FileNotFoundError as error:
            states[name] = {"path": None, "found": False, "reason": str(error).removeprefix("checkpoint: ")}
        else:
            states[name] = {"path": printable(path), "found": path.is_file()}
    return states


def examine() -> dict[str, Any]:
    """Everything that `doctor` tells, as one JSON-able record."""
    return {
        "versions": package_versions(),
        "machine": machine_facts(),
        "tools": build_tools(),
        "cuda_devices": cuda_devices(),
        "backends": backend_states(),
        "auto": auto_choices(),
        "attention": attention_paths(),
        "cpu_instruction_set": libraries.cpu_instruction_set(),
        "build": libraries.build_info(),
        "weights": weight_states(),
        "plugins": {name: printable(path) for name, path in sorted(shipped_plugins().items())},
    }


def yes_or_no(good: bool, text: str) -> Text:
    return Text.assemble(("yes  ", "green") if good else ("no   ", "red"), text)


def describe_library(facts: dict[str, Any]) -> Text:
    """One compiled library: what it was built with and for, or why it was not built."""
    if not facts.get("built"):
        return yes_or_no(False, str(facts.get("reason", "no reason recorded")))
    details = {name: value for name, value in facts.items() if name != "built"}
    listed = (f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in details.items())
    return yes_or_no(True, ", ".join(listed))


def tables(record: dict[str, Any]) -> list[Table]:
    """The record as one table a subject."""

    def table(title: str, rows: dict[str, Any]) -> Table:
        sheet = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2)
        )
        sheet.add_column(style="cyan", no_wrap=True)
        sheet.add_column(overflow="fold")
        for name, value in rows.items():
            text = value if isinstance(value, Text) else Text(str(value))
            sheet.add_row(name, Text("not found", "yellow") if value is None else text)
        return sheet

    devices = {
        f"cuda:{index}": f"{device['name']}, compute capability {device['capability']}, {device['memory_gib']} GiB"
        for index, device in enumerate(record["cuda_devices"])
    }
    libraries = record["build"].get("libraries", {})
    built: dict[str, str | Text] = {name: describe_library(facts) for name, facts in libraries.items()}
    compiled_by = {name: record["build"][name] for name in ("compiler", "architecture") if name in record["build"]}
    running = {"CPU kernels run with": record["cpu_instruction_set"] or "none: the library is not loaded"}
    auto = {f"auto on {name}": choice or "no such device" for name, choice in record["auto"].items()}
    paths = {
        name: uses and ", ".join(f"{path} for {use}" for use, path in uses.items())
        for name, uses in record["attention"].items()
    }
    attention = {f"attention on {name}": path or "no such device" for name, path in paths.items()}
    states: dict[str, str | Text] = {}
    for name, state in record["backends"].items():
        states[name] = yes_or_no(state["available"], state["reason"] or "")
        for device, there in state.get("devices", {}).items():
            states[f"{name} on {device}"] = yes_or_no(there["available"], there["reason"] or "")
    return [
        table("Versions", record["versions"]),
        table("Machine", record["machine"] | record["tools"] | (devices or {"cuda devices": "torch sees none"})),
        table("Compiled", (built or {"libraries": "none: built with STABLE_SAM_BUILD=none"}) | compiled_by | running),
        table("Backends", states | auto | attention),
        table("Weights", {n: yes_or_no(s["found"], s["path"] or s["reason"]) for n, s in record["weights"].items()}),
        table("Plugins", record["plugins"] or {"plugins": "none is shipped"}),
    ]


@explain_user_errors
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the tables.")] = False,
) -> None:
    """Say what this machine and installation can do, and why not more."""
    record = examine()
    if as_json:
        write(json.dumps(record, indent=2, allow_nan=False))
        return
    for sheet in tables(record):
        write(table_lines(sheet), "")
