"""Thousands of damaged COCO files: each is used in part, or refused in words, in little memory."""

import json
import subprocess
import sys

import pytest

# Runs in a process of its own, so that its memory can be limited and a crash of native code is seen.
SCRIPT = r"""
import copy, json, math, random, resource, sys, warnings
from pathlib import Path

import numpy as np
from PIL import Image

from stable_sam_cuda.notes import DataWarning
from stable_sam_cuda.data.dataset import check_samples, find_masked_images

first, last, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**31, virtual + 2**31))

HEIGHT, WIDTH = 48, 64
SQUARE = [4, 5, 30, 5, 30, 25, 4, 25]
SEGMENTATIONS = [
    [SQUARE], SQUARE, [SQUARE, [40, 30, 60, 30, 50, 44]], [[4, 5], [30, 5], [30, 25]],
    {"size": [HEIGHT, WIDTH], "counts": [100, 200, HEIGHT * WIDTH - 300]},
    {"size": [HEIGHT, WIDTH], "counts": "j7d0l0" + "0" * 67 + "fS1"},
]
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, 1e5, 1e7, 1e9, 1e300, -1e300, math.nan, math.inf, -math.inf, 2**31, 2**63,
    10**400, "", "1", "x" * 1000, "\ud800", "\0", "a\nb", "..", "/", "https://example.org/a.png", [], {}, [[]], [None],
    [1, 2], [[1, 2, 3]], {"size": [1, 1]}, {"size": [10**9, 10**9], "counts": "0"}, [1e9] * 6, [[1e300, 1, 2, 3, 4, 5]],
]


def whole():
    images = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in (1, 2, 3)]
    annotations = [
        {"id": n, "image_id": n % 3 + 1, "category_id": 1, "iscrowd": 0, "bbox": [4, 5, 26, 20], "area": 520,
         "segmentation": copy.deepcopy(segmentation)}
        for n, segmentation in enumerate(SEGMENTATIONS)
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}


def places(content):
    # Every container and key or index in it, whatever is nested in what.
    found, waiting = [], [content]
    while waiting:
        here = waiting.pop()
        items = list(here.items()) if isinstance(here, dict) else list(enumerate(here))
        for key, value in items:
            found.append((here, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def mutated(rng):
    content = whole()
    if rng.random() < 0.75:
        for _ in range(rng.randint(1, 3)):
            here, key = rng.choice(places(content))
            kind = rng.choice(["set", "set", "set", "delete", "copy", "wrap", "swap"])
            if kind == "set":
                here[key] = copy.deepcopy(rng.choice(VALUES))
            elif kind == "delete":
                del here[key]
            elif kind == "copy" and isinstance(here, list):
                here.insert(key, copy.deepcopy(here[key]))
            elif kind == "wrap":
                here[key] = [here[key]]
            else:
                other, name = rng.choice(places(content))
                here[key] = copy.deepcopy(other[name])
        return json.dumps(content).encode()
    data = bytearray(json.dumps(content).encode())
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        kind = rng.choice(["flip", "cut", "insert", "end"])
        if kind == "flip":
            data[place] = rng.randrange(256)
        elif kind == "cut":
            del data[place : place + rng.randint(1, 20)]
        elif kind == "insert":
            data[place:place] = bytes(rng.choice(b'{}[]",:0123456789-.eNnIt\\') for _ in range(rng.randint(1, 5)))
        elif rng.random() < 0.2:
            del data[place:]
        data = data or bytearray(b" ")
    return bytes(data)


for number in (1, 2, 3):
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{number}.png")
path = root / "annotations.json"
count = {"refused": 0, "noted": 0, "skipped": 0, "used": 0, "unnamed": []}
for seed in range(first, last):
    path.write_bytes(mutated(random.Random(seed)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            good, broken = check_samples(find_masked_images(path if seed % 2 else root))
        except (ValueError, OSError) as error:
            count["refused"] += 1
            texts = [str(error), *(str(one.message) for one in caught)]
            named = any(str(path) in text and "expected" in text for text in texts)
            if not named or "\n" in str(error) or len(str(error)) > 1500:
                count["unnamed"].append([seed, str(error)[:300]])
            continue
        for sample in good:
            assert sample.load()[1].shape == (HEIGHT, WIDTH)
            sample.digest()
    notes = [one.message for one in caught if issubclass(one.category, DataWarning)]
    others = [str(one.message) for one in caught if not issubclass(one.category, DataWarning)]
    texts = [str(one) for one in notes]
    count["unnamed"] += [[seed, text[:300]] for text in texts if str(path) not in text or not text.isprintable()]
    count["unnamed"] += [[seed, "said twice: " + text[:300]] for text in set(texts) if texts.count(text) > 1]
    count["unnamed"] += [[seed, "a warning of another kind: " + text[:300]] for text in others]
    told = ("expected", "picture has size", "the mask is empty")
    count["unnamed"] += [[seed, why[:300]] for _, why in broken if not any(part in why for part in told)]
    count["used"] += len(good)
    count["skipped"] += len(broken)
    count["noted"] += len(notes)
# Not getrusage: its peak begins with that of the process that started this one.
count["mebibytes"] = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps(count))
"""


@pytest.mark.parametrize(
    "seeds", [(0, 150), pytest.param((150, 2150), marks=pytest.mark.slow)], ids=["first_150", "next_2000"]
)
def test_every_damaged_file_is_used_in_part_or_refused_by_name(seeds, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, seeds), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr[-3000:]
    count = json.loads(run.stdout)
    assert count["unnamed"] == []
    assert count["mebibytes"] < 2048
    number = seeds[1] - seeds[0]
    assert count["refused"] > number / 20
    assert count["noted"] > number / 4
    assert count["used"] > number
