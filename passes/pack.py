"""pack: the folded graph -> weights.safetensors and graph.json.

Needs `folded` and, so that nothing is packed in vain, `verified`. Writes the weights as values and
metadata in the order of sparse tensor cores, every other tensor in its own type, and every node of
the graph. Guarantees `packed`: `load_packed` restores the exact integers.

Raises InternalError for a weight that breaks the pattern which its plan says was applied.
"""

from __future__ import annotations

from gpusq_compile.compilation import Compilation
from gpusq_compile.packed_file import write_packed
from gpusq_compile.pass_base import Pass, PassResult
from gpusq_compile.remarks import analysis


def run(compilation: Compilation) -> PassResult:
    packed = compilation.packed = write_packed(
        compilation.ir,
        compilation.workdir,
        model=compilation.source.origin,
        scope=compilation.network.scope,
        parameters=compilation.parameters,
        half=compilation.rules.target.precision == "fp16",
    )
    result = PassResult(matched=len(packed.layers), changed=len(packed.layers))
    result.remarks.append(analysis("packed", f"{len(packed.layers)} weights, {packed.file} bytes"))
    return result


PASS = Pass(
    name="pack",
    summary="write the packed weights and the graph",
    run=run,
    requires=("folded", "verified"),
    ensures=("packed",),
)
