"""A row of the accuracy benchmark by NVIDIA Model Optimizer, in its own virtual environment.

    .venv-peer/bin/python peer/modelopt_finetune.py peer-int8 deit 0 -o FOLDER

What a careful user of it does: 2:4 masks, a phase of its distillation from the dense teacher with
the masks live, then quantization and a phase of its distillation-aware QAT. The masks stay live
through both phases (`mts.export` before QAT would lose them), and are made part of the weights
with `mts.export` at the end. Its LSQ learns the scales of block-quantized weights alone, so with
one scale per channel they are calibrated. Batches, steps, optimizer, schedule and loss weights of
labels and logits are those of the other rows.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modelopt.torch.distill as mtd
import modelopt.torch.quantization as mtq
import modelopt.torch.sparsity as mts
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.calib import HistogramCalibrator
from torch import nn

import accuracy_control
import accuracy_recipe as recipe
import fashion_mnist

MASKS = os.environ.get("PEER_MASKS", "sparse_magnitude")
INPUT_PERCENTILE = 99.0
# Dense and float in every row of the table, too.
FLOAT = ("*head*",)


def main() -> None:
    job, folder = recipe.parse_job((__doc__ or "").splitlines()[0])
    warnings.simplefilter("ignore")
    task = recipe.Task(job)
    model = fashion_mnist.load_teacher(job.teacher)
    dense = accuracy_control.frozen(model)

    def show_calibration(model: nn.Module) -> None:
        with torch.no_grad():
            for pixels in task.calibration:
                model(pixels)

    config = {
        "data_loader": task.calibration,
        "collect_func": lambda pixels: pixels,
        "device": "cpu",
    }
    model = mts.sparsify(model, MASKS, config if MASKS == "sparsegpt" else None)
    train(task, model, dense, job.rates[0])
    bits = 8 if job.row == "peer-int8" else 4
    model = mtq.quantize(model, quantization(bits), forward_loop=show_calibration)
    if bits == 4:
        search_input_ranges(model, show_calibration)
    train(task, model, dense, job.rates[1])
    about = {
        "sparse_layers": sum(is_2_4(module) for module in weighted(model)),
        "quantized_layers": sum(quantized(module) for module in weighted(model)),
        "layers": len(weighted(model)),
        "masks": MASKS,
    }
    task.save(folder, model.eval(), about)


def quantization(bits: int) -> dict[str, Any]:
    """Its INT8 configuration, or the same with 4 bits for weights and inputs."""
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    entries = config["quant_cfg"]
    if bits == 4:
        for entry in entries:
            if "cfg" in entry and entry["cfg"] and "num_bits" in entry["cfg"]:
                entry["cfg"]["num_bits"] = 4
        config["algorithm"] = {
            "method": "mse",
            "step_size": 0.05,
            "start_multiplier": 0.3,
            "stop_multiplier": 1.0,
        }
    skipped = FLOAT if bits == 8 else (*FLOAT, "*patch_embed*")
    entries += [{"quantizer_name": name, "enable": False} for name in skipped]
    return config


def search_input_ranges(model: nn.Module, show_calibration: Any) -> None:
    """Ranges of the inputs by a percentile of its histograms: the maximum is too wide for 4 bits.

    Of its choices (maximum, entropy, squared error, percentiles from 98 to 99.99) this one did
    best for both teachers on validation images, before any fine-tune.
    """
    inputs = [
        module.input_quantizer
        for module in weighted(model)
        if quantized(module) and module.input_quantizer.is_enabled
    ]
    for quantizer in inputs:
        quantizer._calibrator = HistogramCalibrator(num_bits=4, axis=None, unsigned=False)
        quantizer.disable_quant()
        quantizer.enable_calib()
    show_calibration(model)
    for quantizer in inputs:
        quantizer.load_calib_amax("percentile", percentile=INPUT_PERCENTILE)
        quantizer.enable_quant()
        quantizer.disable_calib()


def train(task: recipe.Task, model: nn.Module, teacher: nn.Module, lr: float) -> None:
    """One phase of its distillation: labels, and KL from the teacher's logits."""
    share = recipe.BETA / (recipe.ALPHA + recipe.BETA)
    config = {
        "teacher_model": copy.deepcopy(teacher),
        "criterion": mtd.LogitsDistillationLoss(temperature=1.0, reduction="batchmean"),
        "loss_balancer": mtd.StaticLossBalancer(share),
    }
    model = mtd.convert(model, mode=[("kd_loss", config)])
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.STEPS)
    for pixels, labels in task.epochs:
        loss = model.compute_kd_loss(student_loss=F.cross_entropy(model(pixels), labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    mtd.export(model)


def weighted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def quantized(module: nn.Module) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    return quantizer is not None and quantizer.is_enabled


def is_2_4(module: nn.Module) -> bool:
    """Whether the weight that the layer computes with is 2:4-sparse along its inputs."""
    weight = module.weight.detach()
    if quantized(module):
        weight = module.weight_quantizer(weight)
    if weight.shape[1] % 4:
        return False
    groups = weight.movedim(1, -1).reshape(-1, 4)
    return bool(((groups != 0).sum(1) <= 2).all())


if __name__ == "__main__":
    main()
