"""Stable-SAM's decoder and predictor on a CPU against plain SAM's: verified first, then timed in turns.

    python bench/cpu_decoder.py [--prompts 1 16 64] [--points 1] [--rounds 5] [--threads 2] [--compile] [--training]
                                [--busy]

All prompts are of one picture. "SAM" is segment_anything's own forward without a plugin; "SAM, compiled" that by
torch.compile; "SAM, shared" the plain model by this package's decoder; then Stable-SAM by each path of the plugin's
attention, of which the first lines printed tell what a user gets; and by that one with the plugin in both blocks.
Ratios are to "SAM". With --training, a step of the plugin's training: decoder forward, and backward to the plugin's
parameters; there is no plain SAM in that, so ratios are to the sampled path. On a machine that has other work, --busy
counts processor time, with one thread. Results: bench/results/cpu/<date>-<commit>-decoder.json.
"""

import argparse
import datetime
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import torch
from decoder_models import models, with_both_blocks
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from timing import machine
from torch import Tensor
from turns import cpu_facts, summary, time_in_turns, write_record

from stable_sam_cuda.backends import find_for_attention
from stable_sam_cuda.modules import attention
from stable_sam_cuda.modules.attention import AttentionPath, choose_path
from stable_sam_cuda.sam import StableSamPredictor, plugin_of
from stable_sam_cuda.sam.shared_decoder import THREE_MASKS, decode

SIDE = 64  # of SAM's image embedding
PICTURE = (512, 512)  # the size to which the predictor brings masks
VERIFIED = 4  # prompts: in float64 SAM's own forward takes a GB for every 16
LARGEST_ERROR = 1e-3  # of logits, over their root mean square in float64

BOTH = "Stable-SAM, both blocks"

Answer = tuple[Tensor, Tensor]
Contestant = tuple[Callable[[], object], AbstractContextManager]


def on_path(path: AttentionPath) -> AbstractContextManager:
    """In place of the choice that a user gets."""
    return patch.object(attention, "choose_path", lambda *arguments, **options: path)


def paths() -> dict[str, AttentionPath]:
    """The paths of this machine's own kernels, by their names in the tables."""
    there = list(AttentionPath)
    if find_for_attention("auto", torch.device("cpu"), torch.float32) is None:
        there.remove(AttentionPath.FUSED)
    return {f"Stable-SAM, {path.value}": path for path in there}


class Prompts:
    """So many prompts on one picture, and all ways to answer them."""

    def __init__(self, plain: Sam, stable: Sam, count: int, points: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.plain, self.stable, self.both = plain, stable, with_both_blocks(stable)
        self.image = torch.randn(1, 256, SIDE, SIDE, generator=generator)
        side = plain.prompt_encoder.input_image_size[0]
        self.coordinates = torch.rand(count, points, 2, generator=generator) * side
        self.labels = torch.ones(count, points)
        with torch.no_grad():
            self.sparse, self.dense = plain.prompt_encoder((self.coordinates, self.labels), None, None)
            self.image_pe = plain.prompt_encoder.get_dense_pe()

    def by_sam(self, decoder: Callable[..., Answer], image: Tensor, image_pe: Tensor) -> Answer:
        """segment_anything's forward, or torch.compile's."""
        return self.first_by_sam(len(self.sparse), decoder, image, image_pe)

    def first_by_sam(self, count: int, decoder: Callable[..., Answer], image: Tensor, image_pe: Tensor) -> Answer:
        """The same for so many of the prompts."""
        return decoder(
            image_embeddings=image,
            image_pe=image_pe,
            sparse_prompt_embeddings=self.sparse[:count].to(image.dtype),
            dense_prompt_embeddings=self.dense[:count].to(image.dtype),
            multimask_output=True,
        )

    def by_us(self, sam: Sam) -> Answer:
        return decode(sam, self.image, self.sparse, self.dense, THREE_MASKS)

    def predictor(self, kind: type[SamPredictor], sam: Sam) -> SamPredictor:
        """One that has the picture's embedding."""
        made = kind(sam)
        made.features, made.original_size, made.is_image_set = self.image, PICTURE, True
        made.input_size = (sam.prompt_encoder.input_image_size[0],) * 2
        return made

    def train(self) -> list[Tensor]:
        logits, _ = self.by_us(self.stable)
        return list(torch.autograd.grad(logits.square().mean(), [*plugin_of(self.stable).parameters()]))

    def decoders(self, compiled: Callable[..., Answer] | None) -> dict[str, Contestant]:
        plain = self.plain.mask_decoder
        made: dict[str, Contestant] = {
            "SAM": (lambda: self.by_sam(plain, self.image, self.image_pe), nullcontext()),
            "SAM, shared": (lambda: self.by_us(self.plain), nullcontext()),
        }
        if compiled is not None:
            made["SAM, compiled"] = (lambda: self.by_sam(compiled, self.image, self.image_pe), nullcontext())
        made |= {name: (lambda: self.by_us(self.stable), on_path(path)) for name, path in paths().items()}
        return made | {BOTH: (lambda: self.by_us(self.both), nullcontext())}

    def predictors(self) -> dict[str, Contestant]:
        arguments = (self.coordinates, self.labels)
        sams = self.predictor(SamPredictor, self.plain)
        ours = self.predictor(StableSamPredictor, self.stable)
        made: dict[str, Contestant] = {"SAM": (lambda: sams.predict_torch(*arguments), nullcontext())}
        return made | {name: (lambda: ours.predict_torch(*arguments), on_path(path)) for name, path in paths().items()}

    def trainings(self) -> dict[str, Contestant]:
        return {name: (self.train, on_path(path)) for name, path in paths().items()}


def run(contestant: Contestant) -> object:
    call, path = contestant
    with path:
        return call()


def verify(prompts: Prompts, contestants: dict[str, Contestant]) -> dict[str, float]:
    """Largest error of each decoder's first logits against SAM's own forward in float64, of the same model."""
    truths = {}
    for sam in (prompts.plain, prompts.stable, prompts.both):
        double = deepcopy(sam.mask_decoder).double()
        images = prompts.image.double(), prompts.image_pe.double()
        truths[sam] = prompts.first_by_sam(VERIFIED, double, *images)[0]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    errors = {}
    for name, contestant in contestants.items():
        model = prompts.both if name == BOTH else prompts.stable if name.startswith("Stable") else prompts.plain
        exact = truths[model]
        found = run(contestant)[0][:VERIFIED]
        errors[name] = ((found.double() - exact).abs().max() / exact.square().mean().sqrt()).item()
        if not errors[name] < LARGEST_ERROR:
            raise SystemExit(f"{name} is wrong: error {errors[name]}")
    torch.use_deterministic_algorithms(False)
    return errors


def compare(
    contestants: dict[str, Contestant], against: str, rounds: int, calls: int, clock: Callable[[], float]
) -> list[dict[str, object]]:
    """One row a contestant, printed too."""
    turns = {name: (lambda c=contestant: run(c)) for name, contestant in contestants.items()}
    times = time_in_turns(turns, rounds, calls, clock)
    rows = []
    for name, milliseconds in times.items():
        facts = summary(times[against], milliseconds)
        ratio = facts.pop("times_slower_than_own")
        rows.append({"contestant": name, **facts, "times_the_first": ratio})
        spread = f"p20 {facts['p20_ms']:.1f}, p80 {facts['p80_ms']:.1f}"
        print(f"  {name:26} {facts['median_ms']:9.1f} ms  ({spread})  {ratio:6.2f} x {against}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--points", type=int, default=1, help="points a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="SAM by torch.compile, too")
    parser.add_argument("--training", action="store_true", help="a training step of the plugin, too")
    parser.add_argument("--busy", action="store_true", help="processor time of one thread, in place of the clock's")
    parser.add_argument(
        "--out", type=Path, help="JSON file, in place of bench/results/cpu/<date>-<commit>-decoder.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1 if options.busy else options.threads)
    clock = time.process_time if options.busy else time.perf_counter

    record: dict[str, object] = {"date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%MZ}"}
    record |= {
        **machine(torch.device("cpu")),
        **cpu_facts(),
        "points": options.points,
        "clock": clock.__name__,
        "results": [],
    }
    for use, gradients in {"inference": False, "training": True}.items():
        record[f"path_for_{use}"] = choose_path("auto", torch.device("cpu"), torch.float32, gradients=gradients).value
        print(f"path for {use}: {record[f'path_for_{use}']}")
    plain, stable = models(torch.device("cpu"))
    compiled = torch.compile(plain.mask_decoder) if options.compile else None
    for count in options.prompts:
        prompts, calls = Prompts(plain, stable, count, options.points), max(1, 4 // count)
        with torch.no_grad():
            decoders = prompts.decoders(compiled)
            errors = verify(prompts, decoders)
            print(f"\ndecoder, {count} prompts")
            rows = [
                row | {"error": errors[row["contestant"]]}
                for row in compare(decoders, "SAM", options.rounds, calls, clock)
            ]
            print(f"predictor, {count} prompts")
            results = {"decoder": rows, "predictor": compare(prompts.predictors(), "SAM", options.rounds, calls, clock)}
        if options.training:
            print(f"training step, {count} prompts")
            results["training"] = compare(prompts.trainings(), "Stable-SAM, sampled", options.rounds, calls, clock)
        record["results"] += [{"what": what, "prompts": count, **row} for what, rows in results.items() for row in rows]
    write_record(record, options.out, behind="-decoder")


if __name__ == "__main__":
    main()
