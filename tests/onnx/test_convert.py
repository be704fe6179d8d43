"""From a module to a graph: every weight once and as it is, under its name, and the batch free where it can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import Apply, dims, graph_of, run
from models import Tied
from torch import Tensor, nn

import dynrank_fx as dr
from dynrank_fx.onnx import converted, export_onnx
from dynrank_fx.onnx.convert import parameter_count, refuse_inflated, renamed


def test_a_batch_that_the_model_fixes_is_said_to_be_fixed(tmp_path: Path) -> None:
    fixed = Apply(lambda layer, x: layer(x).view(2, -1), nn.Linear(4, 4))
    report = export_onnx(fixed, torch.randn(2, 4), tmp_path / "m.onnx")
    assert not report.dynamic_batch
    assert {a.batch for a in report.agreements} == {2}
    assert "batch fixed at 2 (args_0 is 2 x 4); agrees with PyTorch on batch 2 (" in str(report)
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [2, 4]


def test_a_model_that_takes_one_row_only_keeps_its_batch_of_one(tmp_path: Path) -> None:
    single = Apply(lambda layer, x: layer(x.reshape(1, 4)), nn.Linear(4, 4))
    report = export_onnx(single, torch.randn(1, 4), tmp_path / "m.onnx")
    assert not report.dynamic_batch
    assert {a.batch for a in report.agreements} == {1}


def test_given_dynamic_shapes_are_the_ones_exported(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim("length")},)
    model = Apply(lambda x: x.softmax(1))
    assert export_onnx(model, torch.randn(2, 5, 3), tmp_path / "m.onnx", dynamic_shapes=(shapes,)).dynamic_batch
    x = torch.randn(7, 11, 3)
    torch.testing.assert_close(run(tmp_path / "m.onnx", args_0=x)[0], x.softmax(1))


def test_tied_weights_are_stored_once_under_their_name(tmp_path: Path) -> None:
    model = Tied()
    report = export_onnx(model, torch.randint(20, (3, 7)), tmp_path / "m.onnx")
    shapes = dims(tmp_path / "m.onnx")
    assert sorted(s for s in shapes.values() if len(s) == 2) == [(12, 12), (20, 12)]
    assert set(shapes) <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert report.params == sum(p.numel() for p in model.parameters())


def test_a_product_of_weights_is_not_multiplied_out(tmp_path: Path) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Names that the input and the output have as well.
            self.x, self.output = nn.Parameter(torch.randn(64, 2)), nn.Parameter(torch.randn(2, 64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.x @ self.output)

    export_onnx(Product(), torch.randn(3, 64), tmp_path / "m.onnx")
    assert set(dims(tmp_path / "m.onnx").values()) == {(64, 2), (2, 64)}


def test_a_graph_that_grew_beyond_the_module_is_refused() -> None:
    dense = onnx.helper.make_tensor("dense", onnx.TensorProto.FLOAT, (64, 64), np.zeros(4096))
    model = onnx.helper.make_model(onnx.helper.make_graph([], "grown", [], [], [dense]))
    refuse_inflated(model, [torch.zeros(64, 64)])
    with pytest.raises(dr.ExportError, match="4,096 weights where the module has 256"):
        refuse_inflated(model, [torch.zeros(64, 2), torch.zeros(2, 64)])


def test_a_table_that_forward_makes_is_no_weight_but_a_weight_written_twice_is() -> None:
    weight, table = torch.randn(40, 50), torch.arange(3000.0)
    given = [onnx.numpy_helper.from_array(weight.numpy(), "w"), onnx.numpy_helper.from_array(table.numpy(), "t")]
    again = onnx.numpy_helper.from_array(weight.t().contiguous().numpy(), "w_t")
    grown = onnx.helper.make_model(onnx.helper.make_graph([], "table", [], [], given))
    refuse_inflated(grown, [weight])
    grown.graph.initializer.append(again)
    with pytest.raises(dr.ExportError, match="7,000 weights where the module has 2,000"):
        refuse_inflated(grown, [weight])


def test_a_model_in_memory_is_the_one_that_is_written() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).eval(), torch.randn(1, 12)
    made, free = converted(model, ((x,), {}), None, None)
    assert free
    assert parameter_count(made) == sum(p.numel() for p in model.parameters())
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["input", "output"]
    shape = made.graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param
    assert shape.dim[1].dim_value == 12


def test_integers_are_shapes_and_indices_and_no_parameters() -> None:
    weights = {"w": np.zeros((3, 4), np.float32), "h": np.zeros(5, np.float16), "i": np.zeros(7, np.int64)}
    assert parameter_count(graph_of([], {}, {}, weights)) == 3 * 4 + 5


def test_a_new_name_reaches_the_graphs_inside() -> None:
    """Of an If, whose branches read a value of the graph around them."""
    kind = onnx.TensorProto.FLOAT
    y = onnx.helper.make_tensor_value_info("y", kind, [2])
    branches = [
        onnx.helper.make_graph([onnx.helper.make_node(op, ["x"], ["y"])], op, [], [y]) for op in ("Identity", "Neg")
    ]
    node = onnx.helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1])
    made = graph_of([node], {"c": (onnx.TensorProto.BOOL, []), "x": (kind, [2])}, {"z": (kind, [2])}, {})
    renamed(made, lambda name: f"new_{name}")
    onnx.checker.check_model(made, full_check=True)
    session = onnx.reference.ReferenceEvaluator(made)
    for given, sign in ((True, 1), (False, -1)):
        (z,) = session.run(None, {"new_c": np.array(given), "new_x": np.array([1, 2], np.float32)})
        assert z.tolist() == [sign, 2 * sign]
