"""Each example computes on photographs what it computed before it was traced."""

from __future__ import annotations

import pytest
import torch

from gpusq_compile.lowering.runtime import tensor_leaves
from tests.compilations import begin, make_rules, run_until
from tests.example_files import photographs, smallest

# The backbone of the other detector, `cascade_mask_rcnn_swin`, is the same.
SCOPES = {
    "mask_rcnn_swin": "backbone",
    "detr_r50": "",
    "deformable_detr_r50": "",
    "upernet_swin": "",
}


@pytest.mark.parametrize("name", SCOPES)
def test_the_graph_computes_what_the_model_computes(name: str) -> None:
    model = smallest(name).module.get_submodule(SCOPES[name])
    images = photographs()
    with torch.no_grad():
        eager = [tensor_leaves(model(part)) for part in (images[:1], images)]
    graph = run_until(begin(model, images[:2], make_rules()), "canonicalize").ir
    for part, expected in zip((images[:1], images), eager, strict=True):
        with torch.no_grad():
            found = tensor_leaves(graph(part))
        assert [len(output) for output in found] == [len(part)] * len(expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
