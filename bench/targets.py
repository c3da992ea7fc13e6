"""What this project asks of its speed, and which recorded figures answer it: performance_page.py shows both."""

from itertools import product
from typing import NamedTuple

from records import Figure

# Unit -> whether at least that much is asked (otherwise at most), the fact that it needs, its value from both figures.
_UNITS = {
    "% of the copy": (True, "percent_of_copy", lambda ours, theirs: ours["percent_of_copy"]),
    "x as fast": (True, "operation", lambda ours, theirs: ours.slower(theirs)),
    "x its time": (False, "operation", lambda ours, theirs: 1 / ours.slower(theirs)),
    "x its peak memory": (False, "peak_bytes", lambda ours, theirs: ours["peak_bytes"] / max(theirs["peak_bytes"], 1)),
    "s": (False, "operation", lambda ours, theirs: ours.median),
}


class Target(NamedTuple):
    """A figure, or the worst of several sizes, beside a contestant of the same group; ``theirs`` None: for itself."""

    what: str
    against: str
    bound: float
    unit: str
    operation: str
    ours: str
    theirs: str | None = None
    mode: str = "forward"
    dtypes: tuple[str, ...] = ("bfloat16",)
    batches: tuple[int, ...] = (64,)
    cache: str = "cold"

    @property
    def asked(self) -> str:
        return f"{'>=' if _UNITS[self.unit][0] else '<='} {self.bound:g} {self.unit}"

    def outcome(self, figures: list[Figure], missing: str) -> tuple[str, str]:
        """The worst value, with where it was taken, and whether the target is passed. ``figures``: of one machine."""
        at_least, needed, value_of = _UNITS[self.unit]
        facts = ("operation", "mode", "cache", "dtype", "B", "contestant")
        known = [figure for figure in figures if figure[needed] is not None]
        found = {tuple(figure[fact] for fact in facts): figure for figure in known}
        sizes = list(product([self.operation], [self.mode], [self.cache], self.dtypes, self.batches))
        pairs = [(found.get((*size, self.ours)), found.get((*size, self.theirs or self.ours))) for size in sizes]
        values = [(value_of(*pair), pair[0]) for pair in pairs if None not in pair and pair[0].group == pair[1].group]
        if not values:
            return missing, ""
        value, figure = (min if at_least else max)(values, key=lambda pair: pair[0])
        where = f"{figure['dtype']}, B = {figure['B']}" + f", the worst of {len(values)}" * (len(sizes) > 1)
        measured = f"{value:.3g} {self.unit} ({where})"
        if not (value >= self.bound if at_least else value <= self.bound):
            return measured, "**missed**"
        is_whole = len(values) == len(sizes)
        return measured, "passed" if is_whole else f"open: {len(values)} of {len(sizes)} sizes measured"


_EAGER, _COMPILED = "eager chain", "`torch.compile`"
_PLAIN, _SAM = "plain SAM's attention, no plugin", "`segment_anything`'s decoder, no plugin"
_SAMPLER, _LAYER = ("deformable_sample", "cuda"), ("layer", "fused")
_DECODER, _STEP = ("decoder", "fused", "sam"), ("training_step", "fused", "eager", "step")
_DTYPES = ("bfloat16", "float32", "float16")
_ALL, _MANY = {"dtypes": _DTYPES, "batches": (1, 16, 64, 256)}, {"batches": (16, 64, 256)}
_STEPS = {"dtypes": _DTYPES, "batches": (32,)}
_FORWARD, _BACKWARD = "sampler forward, B = 64, bf16", "sampler backward, B = 64, bf16"
_ATTENTION, _TRAINING = "plugin and attention, B = 16 to 256, bf16", "training step, cached embeddings, B = 32"
_WHOLE = "stabilised decoder, B = 1 to 256"

# The sampler's targets name no size but one; that one, 64 prompts in bfloat16, is taken for all of them.
GPU = (
    Target(_FORWARD, "copy, ideal bytes", 85, "% of the copy", *_SAMPLER),
    Target(_FORWARD, _EAGER, 4, "x as fast", *_SAMPLER, "eager"),
    Target(_FORWARD, _COMPILED, 1.3, "x as fast", *_SAMPLER, "compile"),
    Target(_BACKWARD, _EAGER, 5, "x as fast", *_SAMPLER, "eager", "backward"),
    Target(_BACKWARD, _COMPILED, 4, "x as fast", *_SAMPLER, "compile", "backward"),
    Target("plugin and attention, B = 64, bf16", _EAGER, 5, "x as fast", *_LAYER, "eager"),
    Target(_ATTENTION, f"{_PLAIN}, eager", 1.0, "x its time", *_LAYER, "plain", **_MANY),
    Target(_ATTENTION, f"{_PLAIN}, by SDPA", 1.2, "x its time", *_LAYER, "plain, sdpa", **_MANY),
    Target(_WHOLE, _SAM, 1.0, "x its time", *_DECODER, **_ALL),
    Target(_WHOLE, _SAM, 1.0, "x its peak memory", *_DECODER, **_ALL),
    Target(_TRAINING, _EAGER, 3, "x as fast", *_STEP, **_STEPS),
    Target(_TRAINING, _EAGER, 0.5, "x its peak memory", *_STEP, **_STEPS),
)
_ONE, _16 = ({"dtypes": ("float32",), "batches": (batch,), "cache": "warm"} for batch in (1, 16))
_BOTH = ("deformable_sample", "cpu", "eager", "forward+backward")
_PICTURE = "`sam_lite`, a picture of 1024 px, one box, encoder and decoder"
CPU = (
    Target("sampler forward, B = 1", _EAGER, 12, "x as fast", "deformable_sample", "cpu", "eager", **_ONE),
    Target("sampler forward, B = 16", _EAGER, 4, "x as fast", "deformable_sample", "cpu", "eager", **_16),
    Target("sampler forward and backward, B = 1", _EAGER, 5, "x as fast", *_BOTH, **_ONE),
    Target("sampler forward and backward, B = 16", _EAGER, 3, "x as fast", *_BOTH, **_16),
    Target("plugin and attention, B = 16", _EAGER, 3, "x as fast", *_LAYER, "eager", **_16),
    Target("plugin and attention, B = 16", _PLAIN, 1.2, "x its time", *_LAYER, "plain", **_16),
    Target(_PICTURE, "the clock", 1, "s", "set_image + predict", "fused", **_ONE),
)
