#!/usr/bin/env python3
"""Prints the table of docs/gpu.md: how long asking a GPU for one pass takes, and how long computing it.

Pipe `relora-kit train --plan llama_9m,llama_35m,llama_130m,llama_350m,llama_1b --set relora.lora_r=128 --format json` into it.
tests/cuda/train.rs counts the requests.
"""

import json
import sys

WINDOW = 512
REQUEST = 5e-6  # seconds of the host
PEAK = 989e12  # dense bf16, H100 SXM
SHAPES = {"llama_9m": (4, 4), "llama_35m": (6, 8), "llama_130m": (12, 12), "llama_350m": (24, 16), "llama_1b": (24, 32)}  # layers, heads
PER_LAYER, PER_PASS = 95, 18  # requests, without attention's products and softmax
GRAPH_LAYER, GRAPH_PASS = 21, 7  # requests as a graph, with dropout
SCORES = 256 << 20  # bytes of scores that exist at a time
FORWARD, BACKWARD = (6, 5, 3), (12, 13, 8)  # bytes per score, requests for several windows at once, and for one


def pieces(heads, windows, way):
    per_score, several, one = way
    together = min(SCORES // (per_score * WINDOW * WINDOW) // heads, windows)
    return several * -(-windows // together) if together > 1 else one * windows


def main():
    low = [n for n in json.load(sys.stdin)["needs"] if n["mode"] == "relora" and n["dtype"] == "bf16"]
    print("| model | windows | requests | asking | as a graph | computing at the peak | at 40% of it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for n in low:
        layers, heads = SHAPES[n["model"]]
        for windows in (16, 64):
            attention = pieces(heads, windows, FORWARD) + pieces(heads, windows, BACKWARD)
            requests = layers * (PER_LAYER + attention) + PER_PASS
            computing = windows * WINDOW * n["flops_per_token"] / PEAK
            as_graph = layers * GRAPH_LAYER + GRAPH_PASS
            times = [requests * REQUEST, as_graph * REQUEST, computing, computing / 0.4]
            print(f"| {n['model']} | {windows} | {requests} | " + " | ".join(f"{1e3 * t:.1f} ms" for t in times) + " |")


main()
