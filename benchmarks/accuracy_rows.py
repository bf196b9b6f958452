"""The rows of the accuracy benchmark, and how one of them is made.

    python accuracy_rows.py ROW TEACHER SEED [--split ...] [--lr ...] -o FOLDER

The rows of the peer are made by `peer/modelopt_finetune.py`, in its own environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accuracy_recipe as recipe

RULES = Path(__file__).resolve().parent / "rules"

# Table 3 of the GPUSQ-ViT paper: (alpha, beta, gamma), and whether W_j weights the taps.
ABLATION = {
    "no-tap-weights": ((1, 10, 5), False),
    "beta-0": ((1, 0, 5), True),
    "gamma-0": ((1, 10, 0), True),
    "beta-20": ((1, 20, 5), True),
    "beta-30": ((1, 30, 5), True),
    "gamma-10": ((1, 10, 10), True),
    "gamma-2.5": ((1, 10, 2.5), True),
}


@dataclass(frozen=True)
class Row:
    """One row of the table. `maker` is dense, control, compile or peer.

    Of a compiled row `rules` is a file in `rules/` or a shipped name, and `finetune` what is laid
    over it.
    """

    title: str
    maker: str
    rules: str = ""
    labelled: bool = True
    finetune: dict[str, Any] = field(default_factory=dict)


def _rows() -> dict[str, Row]:
    rows = {
        "dense": Row("dense", "dense"),
        "control": Row("dense, same fine-tune (control)", "control"),
        "int8": Row("INT8 2:4", "compile", "int8"),
        "int4": Row("INT4, portable", "compile", "int4"),
        "peer-int8": Row("nvidia-modelopt, INT8 2:4", "peer"),
        "peer-int4": Row("nvidia-modelopt, W4A4 2:4", "peer"),
        "int8-float-output": Row("INT8 2:4, float outputs", "compile", "int8-float-output"),
        "int4-2to4": Row("INT4 2:4, float outputs", "compile", "int4-2to4"),
        "int8-unlabelled": Row(
            "INT8 2:4, float outputs, no labels", "compile", "int8-float-output", labelled=False
        ),
        "int4-unlabelled": Row(
            "INT4 2:4, float outputs, no labels", "compile", "int4-2to4", labelled=False
        ),
        "int4-pairwise": Row("INT4, pair-wise 4:8", "compile", "int4-pairwise"),
        "int4-a8": Row("W4A8, portable", "compile", "int4-a8"),
        "int4-weight-only": Row("W4A16, dense", "compile", "int4-weight-only"),
    }
    one_shot = {
        "magnitude": "magnitude",
        "wanda": "Wanda",
        "obs": "OBS",
        "permute": "magnitude, permuted",
        "gptq": "OBS, GPTQ rounding",
        "reconstruct": "OBS, GPTQ rounding, reconstructed",
    }
    for name, what in one_shot.items():
        title = f"INT8 2:4, one-shot: {what}"
        rows[f"one-shot-{name}"] = Row(title, "compile", f"one-shot-{name}")
    for bits, base in (("int8", "int8-float-output"), ("int4", "int4-2to4")):
        for name, ((alpha, beta, gamma), shares) in ABLATION.items():
            finetune = {
                "loss": {"alpha": alpha, "beta": beta, "gamma": gamma},
                "tap_weights": "prune_loss" if shares else "uniform",
            }
            weighted = "" if shares else ", W_j off"
            title = f"{bits.upper()} 2:4, alpha {alpha}, beta {beta}, gamma {gamma}{weighted}"
            rows[f"{bits}-{name}"] = Row(title, "compile", base, finetune=finetune)
    return rows


ROWS = _rows()


def resolved_rules(job: recipe.Job) -> dict[str, Any]:
    """The rules of a compiled row as one plain document."""
    from gpusq_compile.language.loader import load_rules

    row = ROWS[job.row]
    own = RULES / f"{row.rules}.yaml"
    base = load_rules(own if own.is_file() else row.rules).as_dict()
    finetune = {**base["finetune"], **row.finetune}
    for phase, lr in zip(("sparse", "quantize"), job.rates, strict=True):
        if finetune[phase] != "none":
            finetune[phase] = {**finetune[phase], "lr": lr, "weight_decay": recipe.WEIGHT_DECAY}
    return {**base, "finetune": finetune}


def compiled(job: recipe.Job, folder: Path) -> None:
    """Compile the teacher by the row's rules, and predict with the folded int8 graph."""
    import fashion_mnist
    from gpusq_compile import compile_model

    row = ROWS[job.row]
    task = recipe.Task(job, labelled=row.labelled)
    rules = resolved_rules(job)
    result = compile_model(
        fashion_mnist.load_teacher(job.teacher),
        (task.calibration[0],),
        rules=rules,
        train_data=lambda: task.epochs,
        calibration_data=task.calibration,
        steps=recipe.STEPS,
        engine="none",
        seed=job.seed,
    )
    phases = result.report["finetune"]
    layers = result.report["layers"]
    about = {
        "rules": rules,
        "steps": {name: phase["steps"] for name, phase in phases.items()},
        "verify": result.report["verify"],
        "tap_weights": phases.get("quantize", {}).get("tap_weights", {}),
        "layers": len(layers),
        "sparse_layers": sum(bool(layer["applied"]["sparsity"]) for layer in layers),
        "quantized_layers": sum(bool(layer["applied"]["weight"]) for layer in layers),
    }
    task.save(folder, result.graph, about)


def dense(job: recipe.Job, folder: Path) -> None:
    import fashion_mnist

    recipe.Task(job).save(folder, fashion_mnist.load_teacher(job.teacher), {})


def main() -> None:
    job, folder = recipe.parse_job((__doc__ or "").splitlines()[0])
    maker = ROWS[job.row].maker
    if maker == "compile":
        compiled(job, folder)
    elif maker == "dense":
        dense(job, folder)
    else:
        import accuracy_control

        accuracy_control.run(job, folder)


if __name__ == "__main__":
    main()
