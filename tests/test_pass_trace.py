"""trace: the user's module becomes one graph, batch dynamic, and stays what it was."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpusq_compile.errors import InputError
from gpusq_compile.graph.query import module_class, module_path, op_of, static_shape
from gpusq_compile.network import Network
from gpusq_compile.remarks import Kind
from tests.compilations import begin, make_rules, outputs, remarks_of, run_until
from tests.models import Detector, Perceptron, Shape, TinyViT, images, labelled, noise, seeded


def test_the_graph_computes_what_the_module_computes_for_any_batch() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    traced = run_until(begin(model, images(2), make_rules()), "trace")
    for count in (1, 2, 3, 7):
        batch = images(count, seed=count)
        with torch.no_grad():
            torch.testing.assert_close(traced.ir(batch), model(batch))


def test_the_batch_is_dynamic_and_nothing_else() -> None:
    traced = run_until(begin(seeded(Perceptron), noise(2, 5, 32), make_rules()), "trace")
    [image] = [node for node in traced.ir.graph.nodes if node.op == "placeholder"]
    assert static_shape(image) == (None, 5, 32)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_example_of_any_batch_is_traced(count: int) -> None:
    model = seeded(Perceptron)
    traced = run_until(begin(model, noise(count, 32), make_rules()), "trace")
    assert traced.probe[0][0].shape == (2, 32)
    batch = noise(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(traced.ir(batch), model(batch))


def test_parameters_keep_the_users_names_and_nodes_say_where_they_come_from() -> None:
    model = seeded(TinyViT, Shape(depth=1))
    traced = run_until(begin(model, images(2), make_rules()), "trace")
    assert set(dict(traced.ir.named_parameters())) == set(dict(model.named_parameters()))
    assert traced.parameters.shapes == {n: p.shape for n, p in model.named_parameters()}
    places = {module_path(n): n for n in traced.ir.graph.nodes if op_of(n) == "linear"}
    assert set(places) == {
        f"layers.0.{n}" for n in ("mix.wide", "mix.back", "feed.up", "feed.down")
    } | {"logits"}
    assert module_class(places["logits"]) == "torch.nn.modules.linear.Linear"
    lines = [node.meta.get("source_line", "") for node in traced.ir.graph.nodes]
    assert any("tests/models.py:" in line for line in lines)


def test_the_graph_is_a_drop_in_module_that_can_be_trained() -> None:
    traced = run_until(begin(seeded(Perceptron), noise(2, 32), make_rules()), "trace")
    traced.ir.train().eval()
    for parameter in traced.ir.parameters():
        parameter.requires_grad_(True)
    traced.ir(noise(2, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in traced.ir.parameters())


def test_numerical_checks_run_on_real_data_where_there_is_some() -> None:
    data = labelled(1)
    traced = run_until(
        begin(seeded(TinyViT, Shape(depth=1)), images(2, seed=99), make_rules(), data=data), "trace"
    )
    assert torch.equal(traced.probe[0][0], data[0][0][:2])
    assert torch.equal(traced.reference[0], outputs(traced)[0])


def test_a_scope_is_traced_with_what_the_model_calls_it_with() -> None:
    model = seeded(Detector)
    compilation = begin(model, images(2), make_rules(), scope="backbone")
    traced = run_until(compilation, "trace")
    args, kwargs = traced.probe
    assert args == ()
    torch.testing.assert_close(kwargs["x"], images(2) * 1.5)
    with torch.no_grad():
        expected = model(images(3))
        found = traced.network.run(traced.ir, (images(3),))
    torch.testing.assert_close(found, expected)
    assert model.backbone is traced.network.original


# --- what cannot be traced -----------------------------------------------------------------------


class Raises(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("images must be 3 x 224 x 224")


class Branches(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def failure(run: Callable[[], Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        run()
    return caught.value


def test_a_forward_that_raises_is_shown_with_its_own_message_and_line() -> None:
    compilation = begin(Raises().eval(), noise(2, 32), make_rules())
    error = failure(lambda: run_until(compilation, "trace"))
    assert error.code == "forward-failed"
    assert "ValueError: images must be 3 x 224 x 224" in error.message
    assert error.location is not None
    assert Path(error.location.file).name == Path(__file__).name
    assert error.location.line == Raises.forward.__code__.co_firstlineno + 1


def test_a_model_that_cannot_be_traced_is_told_how_to_go_on() -> None:
    compilation = begin(Branches().eval(), noise(2, 32), make_rules())
    error = failure(lambda: run_until(compilation, "trace"))
    assert error.code == "export-failed"
    assert error.hint is not None
    assert "--scope" in error.hint


INSTALLED = """
from torch import nn
class Chooser(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.act = nn.ReLU()
    def forward(self, x):
        y = self.act(self.body(x))
        return self.head(y) if y.mean() > 0 else y
"""


def test_an_installed_librarys_line_is_named_and_its_submodules_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "chooser_of_a_library.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(folder)
    library = importlib.import_module("chooser_of_a_library")
    with pytest.raises(InputError) as caught:
        run_until(begin(library.Chooser(), noise(2, 16), make_rules()), "trace")
    error = caught.value
    assert error.code == "export-failed"
    assert error.location is not None
    assert (Path(error.location.file).name, error.location.line) == ("chooser_of_a_library.py", 10)
    assert error.hint == (
        "--scope PATH compiles a submodule that can be traced, such as body, head"
    )


def test_an_unknown_scope_names_the_nearest_submodule() -> None:
    error = failure(lambda: Network(seeded(Detector), "backbon"))
    assert error.code == "unknown-scope"
    assert "no submodule 'backbon'" in error.message
    assert error.hint is not None
    assert "did you mean 'backbone'?" in error.hint


def test_a_scope_that_forward_never_calls_is_refused() -> None:
    compilation = begin(Idle().eval(), noise(2, 32), make_rules(), scope="idle")
    error = failure(lambda: run_until(compilation, "trace"))
    assert error.code == "scope-not-called"
    assert "'idle'" in error.message


def test_the_trace_is_noted() -> None:
    traced = run_until(begin(seeded(Perceptron), noise(2, 32), make_rules()), "trace")
    [remark] = remarks_of(traced, "trace", Kind.ANALYSIS)
    assert remark.reason == f"{len(traced.ir.graph.nodes)} nodes from Perceptron"


class Masked(Perceptron):
    """Excludes a class by an infinity, which no later comparison could take apart."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:, 1:], torch.full_like(y[:, :1], float("-inf"))], dim=1)


class Noisy(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


@pytest.mark.parametrize(
    ("model", "code"), [(Masked, "outputs-not-finite"), (Noisy, "not-deterministic")]
)
def test_outputs_that_nothing_can_be_compared_with_are_refused(
    model: type[nn.Module], code: str
) -> None:
    compilation = begin(seeded(model), noise(2, 32), make_rules())
    assert failure(lambda: run_until(compilation, "trace")).code == code


class Foreach(nn.Module):
    """It writes to its input and returns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        torch._foreach_mul_([y], 3.0)
        return y


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y + 1, (x,))
        return result


def test_what_writes_is_never_taken_for_a_check() -> None:
    with pytest.raises(InputError) as caught:
        run_until(begin(Foreach(), noise(2, 32), make_rules()), "canonicalize")
    assert caught.value.code == "operator-unsupported"
    assert "_foreach_mul" in caught.value.message


def test_control_flow_is_refused_at_its_line() -> None:
    with pytest.raises(InputError) as caught:
        run_until(begin(Conditional(), noise(2, 32), make_rules()), "trace")
    assert caught.value.code == "operator-unsupported"
    assert "cond" in caught.value.message
    assert caught.value.location is not None
    assert caught.value.location.file.endswith("test_pass_trace.py")
