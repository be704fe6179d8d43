"""How much memory a switch takes on its way: more than the states before and after it, by how much?

A process of its own trains a chain of linear layers with AdamW and switches it: on a GPU by what torch allocated, else
by the resident set.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measuring import DEVICE
from benchmarks.result import Column, Table

COLUMNS = (
    Column("switch"),
    Column("before", "MB", ".0f"),
    Column("peak", "MB", ".0f"),
    Column("after", "MB", ".0f"),
    Column("peak over the larger, in weights of one site", spec=".1f"),
)

_PROCESS = """
import re, sys, torch
from torch import nn
import dynrank_fx as dr
layers, width, device = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
net = dr.transform(model, (torch.zeros(2, width),)).to(device)
del model
optimizer = torch.optim.AdamW(net.parameters())
def peak():
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
def restart():
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        open("/proc/self/clear_refs", "w").write("5")
for to in (dr.Phase.LOW, dr.Phase.FULL, dr.Phase.LOW):
    net(torch.zeros(2, width, device=device)).sum().backward()
    optimizer.step(); optimizer.zero_grad()
    restart(); before = peak()
    dr.enter_(net, to, optimizer)
    highest = peak()
    restart()
    print(to.name, before, highest, peak())
"""


def peak(quick: bool) -> Table:
    layers, width = (4, 512) if quick else (24, 2048)
    command = [sys.executable, "-c", _PROCESS, str(layers), str(width), DEVICE]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    site = 4 * width * width / 1e6
    rows = []
    for line, label in zip(lines, ("FULL to LOW", "LOW to FULL", "FULL to LOW again"), strict=True):
        before, highest, after = map(float, line.split()[1:])
        rows.append((label, before, highest, after, (highest - max(before, after)) / site))
    return Table(COLUMNS, tuple(rows), f"{layers} linear layers of {width}×{width} ({site:.0f} MB each), AdamW.")
