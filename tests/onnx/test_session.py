"""Sessions: the provider that was asked for or a sentence, on the threads that were said, and no word on the log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace as Fake
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import CPU

import dynrank_fx as dr
from dynrank_fx.onnx import Precision, bound, session, session_of, threads, verify_onnx
from dynrank_fx.onnx.session import check_options, elsewhere


def test_a_provider_that_was_asked_for_must_be_the_one_that_runs(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported[2]
    assert session(path, [CPU]).get_providers() == [CPU]
    assert session(path, [(CPU, {})]).get_providers() == [CPU]
    # As on a machine whose onnxruntime was built for CUDA but finds no libraries: it falls back without a word.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu(onnxruntime.InferenceSession))
    with pytest.raises(dr.ExportError, match=f"CUDAExecutionProvider did not come up.*ask for {CPU}"):
        session(path, ["CUDAExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert session(path).get_providers() == [CPU]


def on_cpu(real: Any) -> Any:
    return lambda path, options, providers, enable_fallback: real(path, options, providers=[CPU])


def test_nodes_that_another_provider_runs_are_counted_by_what_they_do(exported: Any) -> None:
    assert elsewhere(session(exported[2], [CPU])) == {}
    placed = [("CUDA", ["MatMul"]), (CPU, ["Attention"]), (CPU, ["Shape"]), ("CUDA", ["Add"]), (CPU, ["Shape"])]
    parts = [
        Fake(ep_name=name, get_nodes=lambda kinds=kinds: [Fake(op_type=kind) for kind in kinds])
        for name, kinds in placed
    ]
    opened = Fake(get_providers=lambda: ["CUDA", CPU], get_provider_graph_assignment_info=lambda: parts)
    assert elsewhere(opened) == {"Attention": 1, "Shape": 2}
    assert elsewhere(Fake(get_providers=lambda: [CPU])) == {}, "an older onnxruntime does not say"


def test_files_that_are_none(tmp_path: Path, exported: Any) -> None:
    model, x, good, _ = exported
    with pytest.raises(dr.ExportError, match="there is no file"):
        verify_onnx(tmp_path / "m.onnx", model, x)
    (tmp_path / "m.onnx").write_bytes(good.read_bytes()[:-200])
    with pytest.raises(dr.ExportError, match=r"m\.onnx is no ONNX file, or is damaged"):
        verify_onnx(tmp_path / "m.onnx", model, x)


@pytest.mark.parametrize("broken", ["missing", "short", "newer IR", "newer opset"])
def test_a_file_that_cannot_be_opened_says_which_and_why(perceptron: Any, tmp_path: Path, broken: str) -> None:
    path = tmp_path / "m.onnx"
    dr.export_onnx(*perceptron, path, external_data=broken in ("missing", "short"))
    weights, sentence = tmp_path / "m.onnx.data", "is of a newer ONNX than this onnxruntime knows"
    if broken == "missing":
        weights.unlink()
    elif broken == "short":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        model = onnx.load(path)
        if broken == "newer IR":
            model.ir_version = 99
        else:
            model.opset_import[0].version = 99
        path.write_bytes(model.SerializeToString())
    if broken in ("missing", "short"):
        sentence = "the weights of m.onnx lie in a file beside it, which is missing or damaged"
    with pytest.raises(dr.ExportError, match=sentence):
        session(path, ("CPUExecutionProvider",))


def test_a_type_that_the_provider_has_not_is_told(perceptron: Any, tmp_path: Path) -> None:
    with pytest.raises(dr.ExportError, match="float32 or float16") as told:
        dr.export_onnx(*perceptron, tmp_path / "m.onnx", precision=Precision.BFLOAT16)
    assert "onnxruntime_src" not in str(told.value)


def test_an_option_that_the_provider_has_not_is_refused() -> None:
    class Opened:
        def get_provider_options(self) -> dict[str, dict[str, str]]:
            return {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}, CPU: {}}

    check_options(Opened(), "CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    check_options(Opened(), CPU, {"use_arena": "0"})
    with pytest.raises(dr.ExportError, match="CUDAExecutionProvider has no option nonsense"):
        check_options(Opened(), "CUDAExecutionProvider", {"nonsense": "1"})


def test_sessions_run_on_as_many_threads_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, count in (("3", 3), ("4,2", 4), ("", 0), ("many", 0)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert threads() == count


def test_a_session_has_as_many_threads_as_were_said(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert session(exported[2]).get_session_options().intra_op_num_threads == 3


QUIET = """
    import sys
    import numpy as np
    import onnxruntime
    from dynrank_fx.errors import ExportError
    from dynrank_fx.onnx import session, session_of

    severity, path = int(sys.argv[1]), sys.argv[2]
    onnxruntime.set_default_logger_severity(severity)
    opened = session(path, ["CPUExecutionProvider"])
    try:
        session_of(b"no model", "CPUExecutionProvider")
    except ExportError:
        pass
    opened.run(None, {"input": np.zeros((1, 40), np.float32)})
    print("of the caller", file=sys.stderr, flush=True)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("severity", [0, pytest.param(2, marks=pytest.mark.fuzz)])
def test_our_sessions_log_nothing_and_the_callers_go_on_as_they_were_set(exported: Any, severity: int) -> None:
    """0 logs everything, and 2, the default, warnings. Of our sessions nothing is logged in any case, beyond what
    onnxruntime itself says of its environment; after them the caller's own severity still holds.
    """
    command = [sys.executable, "-c", dedent(QUIET), str(severity), str(exported[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours, _, callers = done.stderr.partition("of the caller\n")
    of_sessions = "[V:onnxruntime:,", "[I:onnxruntime:,"  # a session's lines have no logger's name
    assert not any(sign in ours for sign in of_sessions)
    assert any(sign in callers for sign in of_sessions) == (severity == 0)
    if severity == 2:
        assert done.stderr == "of the caller\n"


def test_a_bound_call_gives_what_a_run_gives(exported: Any) -> None:
    opened = session(exported[2], [CPU])
    x = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    bound(opened, {"input": x})()
    with torch.no_grad():
        wanted = exported[0](torch.from_numpy(x))
    torch.testing.assert_close(torch.from_numpy(opened.run(None, {"input": x})[0]), wanted, rtol=1e-5, atol=1e-6)


def test_bytes_are_opened_as_a_file_is(exported: Any) -> None:
    opened = session_of(exported[2].read_bytes(), CPU)
    assert [value.name for value in opened.get_outputs()] == ["output"]
    with pytest.raises(dr.ExportError, match="the model is no ONNX file, or is damaged"):
        session_of(b"no model", CPU)
