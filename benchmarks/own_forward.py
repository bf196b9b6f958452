"""What a model takes by itself: its parameters, and the memory of one forward in FP32.

    python benchmarks/own_forward.py SPEC

The whole model runs, with what is around a compiled submodule, on one batch of what a compile
compares models on, in a process that has loaded what the compiler loads: a compile, which runs the
model too, cannot take less memory. Prints the number of parameters; the peak is for the one who
starts the process to see.
"""

from __future__ import annotations

import sys

import torch

import gpusq_compile.api  # noqa: F401 - for what it loads
from gpusq_compile.data import check_data, some_batches
from gpusq_compile.load_model import load_source


def main() -> None:
    source = load_source(sys.argv[1])
    check_data(source, finetune=False, scoped=True, labelled=False, train_labels=False)
    [batch] = some_batches(source, torch.device("cpu"), limit=1)
    with torch.no_grad():
        source.module.eval()(*batch.inputs)
    print(sum(parameter.numel() for parameter in source.module.parameters()))


if __name__ == "__main__":
    main()
