"""What every model of the zoo goes through: ``run_case`` gives one row of findings."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from cases import ZooCase
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dynrank_fx as dr
from dynrank_fx.errors import reason as line_of
from dynrank_fx.rewrite import switched_modules
from dynrank_fx.tracing import double_batch_of_one, free_dimensions, fresh, quiet, split_inputs, with_batch

STEPS = ("parity", "low", "truncate", "onnx")
LOW_LIMIT = 1e-5  # of LOW at full rank against the original, in float64: the SVD alone is at 1e-12 or so
TRUNCATE_LIMIT = 1e-9

Row = dict[str, Any]


class Wrong(Exception):
    """A check that ran, and did not hold."""


@dataclass
class Run:
    """A case on its way through the steps. note: is given the row whenever there is more in it."""

    case: ZooCase
    note: Callable[[Row], None]
    row: Row = field(default_factory=dict)

    def step(self, stage: str, action: Callable[[], Any]) -> Any:
        """What the action returns, or None where it fails: then the row says at which stage, and why."""
        self.row["stage"], start = stage, time.perf_counter()
        self.note(self.row)
        try:
            return action()
        except Exception as error:
            if isinstance(error, dr.CaptureError):
                stage = "capture"
            kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
            text = str(error).strip().splitlines() or [""]
            self.row["failures"].append({"stage": stage, "error": kind + text[0]})
            return None
        finally:
            times = self.row["times"]
            times[stage] = round(times.get(stage, 0.0) + time.perf_counter() - start, 2)


def run_case(case: ZooCase, steps: Iterable[str] = STEPS, note: Callable[[Row], None] = lambda row: None) -> Row:
    """Every check on one model, as a row that JSON can hold. A failure is in the row: none is raised."""
    run, steps, start = Run(case, note), set(steps), time.perf_counter()
    row = run.row
    row |= {"name": case.name, "source": case.source, "family": case.family}
    row |= {"steps": sorted(steps), "failures": [], "times": {}}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it differs from the ordinary path by rounding
    try:
        _all_steps(run, steps)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["stage"] = "done"
    note(row)
    return row


def _all_steps(run: Run, steps: set[str]) -> None:
    made = run.step("model", lambda: _model(run.case, run.row))
    if made is None:
        return
    model, inputs = made
    net = run.step("capture", lambda: dr.capture(model, inputs))
    if net is None:
        run.row["original"] = _why_not_exported(model, inputs)
        return
    full = run.step("transform", lambda: _transform(net, inputs, 1.0))
    if full is None:
        return
    run.step("plan", lambda: _describe(dr.plan_of(full), model, run.row))
    if "parity" in steps:
        run.step("parity", lambda: _parity(model, full, inputs, run.row))
    if not run.row["sites"]:  # nothing to factor, truncate or export that is not the original
        run.row["steps"] = sorted(steps & {"parity"})
        return
    if steps & {"low", "truncate"}:
        _in_float64(run, steps)
    if "onnx" in steps:
        half = run.step("transform", lambda: _transform(net, inputs, 0.5))
        if half is not None:
            run.step("onnx", lambda: _onnx(half, inputs, run.row))
            if "onnx" not in run.row:
                run.row["original"] = _why_no_onnx(model, inputs)


def _transform(net: nn.Module, inputs: Any, ratio: float) -> nn.Module:
    return dr.transform(net, inputs, rank=dr.Ratio(ratio), allow_unprofitable=True, allow_empty=True)


# The model


def _model(case: ZooCase, row: Row) -> tuple[nn.Module, Any]:
    model, inputs = _made(case)
    row["params"] = sum(p.numel() for p in model.parameters())
    output = call(model.eval(), inputs)
    if not floats(output):
        raise Wrong("the model gives no floating-point tensor")
    if not all(bool(t.isfinite().all()) for t in floats(output)):
        raise Wrong("the perturbed model gives values that are not finite")
    row["insensitive"] = insensitive(model, inputs, output)
    other = with_batch(split_inputs(inputs), 2, seed=3)
    row["reads_input"] = relative(call(model, other), output) > 1e-6
    return model.train(), inputs


def _made(case: ZooCase) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    model, inputs = case.make(), case.inputs()
    calibrate(model, inputs)
    return perturbed(model), inputs


def calibrate(model: nn.Module, inputs: Any) -> None:
    """Batch norms with the statistics of their inputs: with those of a fresh network, activations vanish on the way.

    The variance is kept away from 0, to which that of a batch of two small images can come.
    """
    norms = [m for m in model.modules() if getattr(m, "running_var", None) is not None and hasattr(m, "momentum")]
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    call(model.train(), inputs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.running_var.clamp_(min=0.1 * float(norm.running_var.mean()) + 1e-4)


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and floating buffer away from its initial value, so that parity means something.

    A fresh network has layers that contribute nothing (residual scales of 0 or 1e-6) and norms that do nothing. Noise
    is a tenth of a matrix's deviation, and an absolute 0.05 for vectors; variances and other buffers are multiplied.
    """
    generator = torch.Generator().manual_seed(seed)
    positive = {id(module.running_var) for module in model.modules() if hasattr(module, "running_var")}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point() or 0 in tensor.stride():
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                deviation = float(tensor.std()) if tensor.numel() > 1 else 0.0
                tensor += noise * (0.1 * deviation if tensor.ndim > 1 and deviation else 0.05)
            elif id(tensor) in positive:
                tensor *= 1 + 0.1 * noise.abs()
            else:
                tensor *= 1 + 0.02 * noise
    return model


def insensitive(model: nn.Module, inputs: Any, output: Any) -> list[str]:
    """The matrices that the output does not depend on, each changed by 10 %: of those, parity says nothing.

    The derivative finds most that it does depend on; the others are really changed.
    """
    generator = torch.Generator().manual_seed(4)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    trained = [name for name, p in matrices.items() if p.requires_grad]
    try:
        outputs = floats(call(model, inputs, grad=True))
        total = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)
        found = torch.autograd.grad(total, [matrices[name] for name in trained], allow_unused=True)
    except (AssertionError, RuntimeError):  # some have no gradient in evaluation mode
        trained, found = [], ()
    gradients = dict(zip(trained, found, strict=True))
    size = max(float(t.abs().max()) for t in floats(output))
    without = []
    for name, p in matrices.items():
        change = 0.1 * p.detach() * torch.randn(p.shape, generator=generator)
        gradient = gradients.get(name)
        if gradient is not None and abs(float((gradient * change).sum())) > 1e-4 * size:
            continue
        with torch.no_grad():
            before = p.clone()
            p += change
            if relative(call(model, inputs), output) <= 1e-6:
                without.append(name)
            p.copy_(before)
    return without


def call(model: nn.Module, inputs: Any, *, grad: bool = False) -> Any:
    args, kwargs = split_inputs(fresh(inputs))
    torch.manual_seed(7)
    with torch.set_grad_enabled(grad):
        return model(*args, **kwargs)


def leaves(output: Any) -> list[Tensor]:
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += leaves([getattr(leaf, f.name) for f in fields(leaf)])
    return found


def floats(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if leaf.is_floating_point()]


def relative(got: Any, want: Any) -> float:
    """The largest error of any output, as a share of its largest value; infinite where the outputs do not compare."""
    ours, theirs = leaves(got), leaves(want)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not b.numel():
            continue
        a, b = a.detach().double(), b.detach().double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return float("inf")
        scale = float(b[finite].abs().max()) if finite.any() else 1.0
        error = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
        worst = max(worst, error / scale if scale else error)
    return worst


# The plan


def _describe(plan: dr.Plan, model: nn.Module, row: Row) -> None:
    row["capture"] = str(getattr(plan, "capture", ""))
    row["sites"] = len(plan.sites)
    row["skipped"] = [[s.name, s.params, s.reason] for s in plan.skipped]
    inside = sum(planned.site.params for planned in plan.sites)
    total = inside + sum(s.params for s in plan.skipped)
    row["site_params"], row["matrix_params"] = inside, total
    listed = [name for each in (*[p.site for p in plan.sites], *plan.skipped) for name in (each.name, *each.aliases)]
    matrices = [name for name, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    if missing := set(matrices) ^ set(listed):
        raise Wrong(f"{len(missing)} matrices are neither sites nor explained, such as {min(missing)}")
    if vague := [s.name for s in plan.skipped if not s.reason or "unsupported" in s.reason]:
        raise Wrong(f"{vague[0]} is left dense without a reason")


# The checks


def _parity(model: nn.Module, net: nn.Module, inputs: Any, row: Row) -> None:
    """FULL against the original, bit for bit: outputs in both modes, gradients, and buffers after one step."""
    row["full_eval"] = row["full_train"] = row["full_grads"] = False
    expected, got = call(model.eval(), inputs), call(net.eval(), inputs)
    _equal(got, expected, "eval output")
    row["full_eval"] = True
    expected, got = call(model.train(), inputs, grad=True), call(net.train(), inputs, grad=True)
    _equal(got, expected, "train output")
    row["full_train"] = True
    wanted, found = _gradients(model, expected), _gradients(net, got)
    if missing := wanted.keys() ^ found.keys():
        raise Wrong(f"{len(missing)} gradients on one side only, such as {min(missing)}")
    different = [name for name, gradient in wanted.items() if not torch.equal(gradient, found[name])]
    if different:
        name = different[0]
        error = relative(found[name], wanted[name])
        raise Wrong(f"{len(different)} of {len(wanted)} gradients differ, such as {name} by {error:.1e}")
    buffers = dict(net.named_buffers())
    different = [name for name, b in model.named_buffers() if name in buffers and not torch.equal(b, buffers[name])]
    if different:
        raise Wrong(f"{len(different)} buffers differ after a step, such as {different[0]}")
    row["full_grads"] = True


def _equal(got: Any, want: Any, what: str) -> None:
    ours, theirs = leaves(got), leaves(want)
    if len(ours) != len(theirs):
        raise Wrong(f"{what}: {len(ours)} tensors instead of {len(theirs)}")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        same = a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())
        if not same:
            raise Wrong(f"{what} {i} differs: by {relative(a, b):.1e}")


def _gradients(model: nn.Module, output: Any) -> dict[str, Tensor]:
    """The gradients of the mean square of what the model gives, by the names of the original's parameters."""
    model.zero_grad()
    sum(t.square().mean() for t in floats(output) if t.requires_grad).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, modules in switched_modules(model).items():
        path = next(path for path, module in model.named_modules() if module is modules[0])
        if (gradient := found.pop(f"{path}.weight", None)) is not None:
            found[name] = gradient
    return found


def _in_float64(run: Run, steps: set[str]) -> None:
    """The checks that rounding would blur; in float32, with wider limits, where the original has no other."""
    made = run.step("model in float64", lambda: _precise(run.case, run.row))
    if made is None:
        return
    model, inputs, expected = made
    net = run.step("capture", lambda: dr.capture(model, inputs))
    if net is None:
        return
    if "low" in steps:
        run.step("low", lambda: _low(net, inputs, expected, run.row))
    if "truncate" in steps:
        run.step("truncate", lambda: _truncate(model, net, inputs, run.row))


def _precise(case: ZooCase, row: Row) -> tuple[nn.Module, Any, Any]:
    model, inputs = _made(case)
    try:
        precise = in_float64(model.eval(), inputs)
        return *precise, call(*precise)
    except Exception as error:
        row["float32"] = f"the original does not run in float64: {line_of(error)}"
        model, inputs = _made(case)
        return model.eval(), inputs, call(model, inputs)


def in_float64(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return model.double(), inputs


def _low(net: nn.Module, inputs: Any, expected: Any, row: Row) -> None:
    """At full rank the factors compute what the dense weights do."""
    low = _transform(net, inputs, 1.0).eval()
    dr.enter_(low, dr.Phase.LOW)
    row["low"] = error = relative(call(low, inputs), expected)
    if not error <= (1e-3 if "float32" in row else LOW_LIMIT):
        raise Wrong(f"LOW at full rank is off by {error:.1e}")


def _truncate(model: nn.Module, net: nn.Module, inputs: Any, row: Row) -> None:
    """At half the rank, the truncated model computes what the net in LOW does, on another batch size."""
    limit = 1e-4 if "float32" in row else TRUNCATE_LIMIT
    low = _transform(net, inputs, 0.5).eval()
    dr.enter_(low, dr.Phase.LOW)
    small = dr.truncate(low)
    row["truncate"] = error = relative(call(small, inputs), call(low, inputs))
    if not error <= limit:
        raise Wrong(f"the truncated model is off by {error:.1e}")
    more = with_batch(split_inputs(inputs), 3, seed=5)
    try:
        call(model, more)
    except Exception as error:
        row["batch"] = f"the model takes one batch size only: {line_of(error)}"
        return
    try:
        expected = call(low, more)
    except AssertionError as error:
        if "serves no other" not in str(error):
            raise
        row["batch"] = str(error)  # refused in a sentence, as the plan says
        return
    row["truncate"] = error = relative(call(small, more), expected)
    if not error <= limit:
        raise Wrong(f"the truncated model is off by {error:.1e} on another batch")


def _onnx(half: nn.Module, inputs: Any, row: Row) -> None:
    small = dr.truncate(half)
    row["rounding"] = rounding = _rounding(small, inputs)
    with tempfile.TemporaryDirectory() as folder:
        report = dr.export_onnx(small, inputs, Path(folder, "small.onnx"), tolerance=max(1e-4, 10 * rounding))
    row["onnx"] = max((agreement.max_rel for agreement in report.agreements), default=0.0)
    row["onnx_free"] = report.dynamic_batch


def _rounding(model: nn.Module, inputs: Any) -> float:
    """What float32 alone makes of the output: deep models with random weights can amplify it beyond any tolerance."""
    model.eval()
    try:
        return relative(call(model, inputs), call(*in_float64(copy.deepcopy(model), inputs)))
    except Exception:  # no float64: the usual tolerance
        return 0.0


# Whose failure it is


def _why_not_exported(model: nn.Module, inputs: Any) -> str:
    """What torch.export says of the original model, without us."""
    args, kwargs = double_batch_of_one(*split_inputs(fresh(inputs)))
    try:
        with quiet():
            torch.export.export(
                model.eval(), args, kwargs, dynamic_shapes=free_dimensions(args, kwargs, only_first=True)
            )
    except Exception as error:
        return f"torch.export fails on the original model too: {line_of(error)}"
    return "torch.export exports the original model"


def _why_no_onnx(model: nn.Module, inputs: Any) -> str:
    """What torch.onnx says of the original model without us, and then our own export and comparison of it."""
    model.eval()
    args, kwargs = double_batch_of_one(*split_inputs(fresh(inputs)))
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=free_dimensions(args, kwargs, only_first=True),
            )
    except Exception as error:
        return f"torch.onnx fails on the original model too: {line_of(error)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            dr.export_onnx(model, inputs, Path(folder, "original.onnx"))
        except dr.ExportError as error:
            return f"torch.onnx exports the original model, export_onnx does not: {str(error).splitlines()[0]}"
    return "export_onnx exports the original model"
