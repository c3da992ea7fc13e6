"""Training of the base model ``sam_lite``, with good prompts only.

    python -m stable_sam_cuda.training.sam_lite --data DATA --out RUN --minutes 60 --image-size 256

Tight boxes with SAM's own small jitter and 1 to 10 points, as SAM itself was trained: its weakness against
sloppy prompts is the model's own. The schedule is a cosine over the time budget, so a run ends when it was
told to, whatever the machine; ``--init`` starts from another run's weights (say at a larger image size), ``--resume``
continues the run in RUN from its last checkpoint over the time that is left, also on another machine. Ctrl-C and
SIGTERM end it behind a checkpoint; a second one at once.
Under ``torchrun`` each process draws ``--batch`` pictures of its own, and weights are averaged every 16 steps: on two
CPU cores, with a thread a process, that makes more of the time than averaged gradients or two threads.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from stable_sam_cuda.data.sharding import process_group
from stable_sam_cuda.devices import own_device, pick_device
from stable_sam_cuda.training.interruption import Interrupted, Terminated
from stable_sam_cuda.training.sam_lite.loop import train
from stable_sam_cuda.training.sam_lite.options import Recipe, Settings


def command_line() -> argparse.ArgumentParser:
    """Options under the names of `Recipe`'s and `Settings`' fields, with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with splits.json and SET/images, SET/masks")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log, checkpoint and record")
    parser.add_argument("--init", type=Path, help="weights to start from; default: ImageNet backbone")
    parser.add_argument("--variant", choices=["lite0", "lite1"])
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--minutes", type=float, help="of the whole run, over all calls")
    parser.add_argument("--steps", type=int, help="stop after so many steps, if the time has not run out before")
    parser.add_argument("--pause-after", type=float, help="minutes after which this call writes a checkpoint and ends")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--objects", type=int, help="objects a picture")
    parser.add_argument("--copy-paste", type=float, help="how often objects of another picture are pasted on, 0 to 1")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--warmup", type=int, help="steps")
    parser.add_argument("--ema", type=float, help="decay of the averaged weights")
    parser.add_argument("--validate-minutes", type=float)
    parser.add_argument("--checkpoint-minutes", type=float, help="from one checkpoint to the next")
    parser.add_argument("--half", action="store_true", help="encoder and decoder in bfloat16 (autocast), not the loss")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--workers", type=int, help="processes that draw pictures; 0: a thread")
    parser.add_argument("--tensorboard", action="store_true", help="curves in OUT/tensorboard")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT, or begin it")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in OUT")
    parser.add_argument("--seed", type=int)
    defaults = {one.name: one.default for kind in (Recipe, Settings) for one in fields(kind)}
    names = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name in names - {"data", "out"}})
    return parser


def main() -> None:
    """Command line."""
    parser = command_line()
    values = vars(parser.parse_args())
    recipe = Recipe(**{one.name: values.pop(one.name) for one in fields(Recipe)})
    try:
        with process_group():
            device = pick_device(own_device(values["device"]))
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)
            train(Settings(**values, recipe=recipe), device)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"error: {error}\n")
    except Interrupted as error:
        parser.exit(130, f"checkpoint at step {error.step}; --resume continues\n")
    except Terminated as error:
        parser.exit(143, f"checkpoint at step {error.step}; --resume continues\n")


if __name__ == "__main__":
    main()
