"""The rows of docs/results.md: what is trained, and on what; one `Row` is one line of a table."""

from dataclasses import dataclass, field

# Regions, or outlines too coarse to learn a boundary from: never for the plugin (see docs/data.md).
EXCLUDED = ("bsds500", "camvid", "mugs_bottles", "waste_bottles", "feet")


@dataclass(frozen=True)
class Row:
    """One method, trained in one way; ``options`` are those of ``stable-sam train``, None trains nothing."""

    name: str
    label: str
    options: dict[str, object] | None = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    tested: bool = False  # also on the sets that never trained anything
    protocol: bool = False  # also with the paper's 20 prompts a kind


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other."""

    name: str
    title: str
    rows: tuple[Row, ...]


THREE = (0, 1, 2)
BASE = Row("sam_lite", "`sam_lite` alone", None, tested=True, protocol=True)
FULL = Row("stable", "Stable-SAM (DSP + RTS + DRP)", {"method": "stable"}, THREE, tested=True)
BOTH = Row("stable_both", "Stable-SAM, shared by both blocks", {"method": "stable", "blocks": 2}, THREE, tested=True)
LONGER = {"epochs": 4, "mix": "noisy_box=4,one_point=1.5,gt_box=1,three_points=0.5,ten_points=0.5"}
SHIPPED = Row(
    "stable_long",
    "both blocks, four epochs, more noisy boxes: the plugin that is shipped",
    {"method": "stable", "blocks": 2, **LONGER},
    tested=True,
    protocol=True,
)
DSP_ALONE = {"method": "stable", "router-hidden": 0, "no-robust": True}

BASELINES = {
    "pt": "PT: output token and its hypernetwork",
    "dt": "DT: mask decoder",
    "lora": "LoRA on the decoder's queries and values",
    "adapter": "Adapter behind the decoder's MLPs",
}
BASELINE_SEEDS = {"pt": (0,), "dt": (0, 1), "lora": THREE, "adapter": THREE}

HEADLINE = Table(
    "headline",
    "Stable-SAM beside the baselines: one epoch, the same prompts",
    (
        BASE,
        *(Row(name, label, {"method": name}, BASELINE_SEEDS[name], tested=True) for name, label in BASELINES.items()),
        FULL,
        BOTH,
    ),
)
LONG = Table(
    "long",
    "The shipped plugin beside the baselines: four epochs, the same prompts",
    (
        BASE,
        *(
            Row(f"{name}_long", label, {"method": name, **LONGER}, tested=True)
            for name, label in BASELINES.items()
            if name != "pt"  # far behind after one epoch
        ),
        SHIPPED,
    ),
)
EXACT = Table(
    "exact",
    "The baselines on exact boxes alone",
    (
        BASE,
        Row("dt_exact", "DT, exact boxes only", {"method": "dt", "no-robust": True}),
        Row("lora_exact", "LoRA, exact boxes only", {"method": "lora", "no-robust": True}),
        Row("adapter_exact", "Adapter, exact boxes only", {"method": "adapter", "no-robust": True}),
        FULL,
    ),
)
PARTS = Table(
    "parts",
    "What each part brings",
    (
        BASE,
        Row("dsp", "+ DSP (exact boxes only)", DSP_ALONE),
        Row("dsp_rts", "+ DSP + RTS", {"method": "stable", "router-hidden": 0}),
        FULL,
        Row("router_alone", "RTS + DRP, nothing displaced (s_p = 0)", {"method": "stable", "max-offset": 0}),
    ),
)
BLOCKS = Table(
    "blocks",
    "The plugin in the last block alone, and shared by both",
    (
        FULL,
        BOTH,
        Row("both_still", "shared by both, nothing displaced (s_p = 0)", BOTH.options | {"max-offset": 0}),
        Row("both_dsp", "shared by both, DSP (exact boxes only)", BOTH.options | DSP_ALONE),
    ),
)
LOW_SHOT = Table(
    "low_shot",
    "Few pictures, one epoch",
    tuple(
        Row(
            f"{method}_{count}",
            f"{label}, {count} pictures",
            {"method": method, "limit": count, "images": 2, "occlusions": 0},
        )
        for count in (220, 440)
        for method, label in (("pt", "PT"), ("stable", "Stable-SAM"))
    ),
)
OFFSETS = Table(
    "offsets",
    "How far may sampling reach: s_p in pixels of the 64 x 64 map",
    tuple(
        FULL if reach == 4 else Row(f"reach_{reach}", f"s_p = {reach}", {"method": "stable", "max-offset": reach})
        for reach in (4, 8)
    ),
)
LOSSES = Table(
    "losses",
    "Where the loss is taken",
    (FULL, Row("points", "at PointRend's points, as HQ-SAM has it", {"method": "stable", "loss": "points"})),
)
AMPLITUDES = Table(
    "amplitudes",
    "Three readings of the feature amplitude",
    (
        FULL,
        Row("amplitude_location", "one factor a location", {"method": "stable", "amplitude": "location"}),
        Row("amplitude_channel", "one factor a channel and location", {"method": "stable", "amplitude": "channel"}),
    ),
)
TABLES = (HEADLINE, LONG, EXACT, PARTS, BLOCKS, LOW_SHOT, LOSSES, OFFSETS, AMPLITUDES)


def all_rows() -> list[Row]:
    """Every row once, in the order in which they are worth having."""
    return list({row.name: row for table in TABLES for row in table.rows}.values())
