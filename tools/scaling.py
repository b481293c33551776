#!/usr/bin/env python3
"""Prints the tables of docs/scaling.md: what data-parallel training would send, and how long that takes.

Counts come from the shapes: pipe `relora-kit train --plan llama_130m,llama_1b,llama_7b --format json` into it.
"""

import json
import sys

WINDOW = 512
WINDOWS = 1024  # per update, over all GPUs
FLOPS = 0.4 * 989e12  # 40% of the dense bf16 peak of an H100 SXM
LATENCY = 10e-6  # seconds of one step of the ring
LINKS = [  # bytes per second, one direction, per GPU
    ("NVLink 4, 450 GB/s", 450e9),
    ("InfiniBand NDR, 50 GB/s", 50e9),
    ("100 Gbit Ethernet, 12.5 GB/s", 12.5e9),
    ("10 Gbit Ethernet, 1.25 GB/s", 1.25e9),
]


def size(count):
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def seconds(t):
    return f"{t:.2f} s" if t >= 1 else f"{1e3 * t:.1f} ms"


def all_reduce(count, ranks, speed):
    return 2 * (ranks - 1) / ranks * count / speed + 2 * (ranks - 1) * LATENCY


def main():
    needs = json.load(sys.stdin)["needs"]
    rows = [n for n in needs if n["mode"] in ("full", "relora") and n["dtype"] == "bf16"]

    print("| model, mode | trained | all-reduced per update, f32 | in bf16 | optimiser state |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for n in rows:
        trained = n["trained"]
        cells = [f"{trained / 1e6:.1f} M", size(4 * trained), size(2 * trained), size(n["optimiser"])]
        print(f"| {n['model']}, {n['mode']} | " + " | ".join(cells) + " |")

    print("\n| model | merged projections, f32 | factors A and B, f32 |")
    print("| --- | ---: | ---: |")
    for full, low in zip(rows[::2], rows[1::2]):
        factors = low["parameters"] - full["parameters"]
        projections = full["parameters"] - (low["trained"] - factors)
        print(f"| {full['model']} | {size(4 * projections)} | {size(4 * factors)} |")

    print("\n| model, mode | " + " | ".join(name for name, _ in LINKS) + " |")
    print("| --- |" + " ---: |" * len(LINKS))
    for n in rows:
        cells = [" / ".join(seconds(all_reduce(4 * n["trained"], ranks, s)) for ranks in (8, 64)) for _, s in LINKS]
        print(f"| {n['model']}, {n['mode']} | " + " | ".join(cells) + " |")

    print("\n| model, mode | computing | " + " | ".join(name for name, _ in LINKS) + " |")
    print("| --- | ---: |" + " ---: |" * len(LINKS))
    for n in rows:
        computing = [WINDOWS * WINDOW / ranks * n["flops_per_token"] / FLOPS for ranks in (8, 64)]
        cells = [" / ".join(map(seconds, computing))]
        for _, speed in LINKS:
            both = zip((8, 64), computing)
            cells.append(" / ".join(f"{100 * c / (c + all_reduce(4 * n['trained'], r, speed)):.0f}%" for r, c in both))
        print(f"| {n['model']}, {n['mode']} | " + " | ".join(cells) + " |")


main()
