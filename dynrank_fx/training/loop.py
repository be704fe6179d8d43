"""The training loop: ticks of a schedule's phases, each step of which can be saved and taken up again."""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..aliases import Batch
from ..checks import compile_mode
from ..errors import DivergedError, DynrankError, DynrankWarning
from ..layouts import effective_rank, stable_rank
from ..phase import Phase
from ..phases import enter_, tried
from ..processes import Processes, is_part, is_sharded, own, started
from ..randomness import random_state, set_random_state
from ..rewrite import a_twin, inline_, switched_modules
from ..text import counted, rounded
from ..tracing import Net
from .clock import Clock, clock_of
from .history import add_
from .phases import Phases
from .run import Run
from .settings import Settings
from .shares import OwnShare
from .task import Task, apply, batches_of, evaluate, loss_of, metric_of
from .watch import Watcher

_END = object()


def fit(
    run: Run,
    task: Task,
    settings: Settings,
    *,
    save: Callable[[Run], None] = lambda run: None,
    watcher: Watcher | None = None,
    should_stop: Callable[[], int] = lambda: 0,
) -> bool:
    """Train to the end of ``settings.epochs`` or ``settings.steps``; True when there, False where ``should_stop`` ended
    it between two steps.

    Where torch.distributed runs, all its processes call this together, each with a net of the same weights on a device
    of its own: it is wrapped in DistributedDataParallel. Each trains on its share of the data, and all stop at the step
    at which one of them is to.

    ``save`` is called after every epoch (or tick), every ``checkpoint_steps`` steps, and on a stop, never with values
    that are not finite. Raises DynrankError for those, a batch that is no input of the model, and a loss that is no
    number; and what enter_ raises.
    """
    watcher = watcher or Watcher()
    if isinstance(run.optimizer, torch.optim.LBFGS):
        raise DynrankError("LBFGS runs the model in its own step, which this loop does not do: give another optimizer")
    forward = _forward(run, settings)
    if settings.amp is torch.float16 and run.scaler is None:
        run.scaler = torch.amp.GradScaler(torch.device(settings.device).type)
    _begin_data(run, task)
    run.phases = phases = _phases(run, task, settings, forward)
    run.totals = run.totals.to(settings.device)
    if (what := _diverged(run)) is not None:
        phases.remove()
        raise DynrankError(f"{what} is not finite before the first step: begin with sound weights")
    endless = _passes(run, task)

    def save_all(run: Run) -> None:
        if is_sharded(run.net):  # DistributedDataParallel brings them before every forward
            _bring_buffers(run)
        save(run)

    try:
        while run.epoch < phases.clock.ticks:
            if run.step == 0:
                _begin_epoch(run, settings, phases)
                watcher.epoch_started(run, phases.transition)
            started = time.perf_counter()
            batches = _one_pass(run, task) if phases.clock.by_epochs else _of_tick(run, phases, endless)
            finished = _train_epoch(run, task, settings, forward, batches, save_all, watcher, should_stop)
            run.note(seconds=(run.current.seconds or 0.0) + time.perf_counter() - started)
            _refuse_diverged(run)
            if not finished:
                save_all(run)
                return False
            _finish_epoch(run, task, settings, phases.clock)
            watcher.epoch_done(run, run.history[-1])
            save_all(run)
        return True
    finally:
        run.hooks, run.phases = phases.hooks_state(), None
        phases.remove()


def _forward(run: Run, settings: Settings) -> nn.Module:
    """What is called in training: the net, compiled, and within DistributedDataParallel where there are several; as it
    is where it is in parts, which are gathered on the way.
    """
    forward: nn.Module = run.net
    if is_sharded(forward):
        if settings.amp is torch.float16:
            raise DynrankError("gradients of a net in parts cannot be scaled for float16: train it in bfloat16")
        return forward
    if settings.compile:
        whole = isinstance(run.net, Net)  # around captured parts, the model's own code may break the graph
        mode = compile_mode(settings.compile)
        forward = torch.compile(run.net, fullgraph=whole, dynamic=settings.dynamic, mode=mode)  # type: ignore[assignment]
    if started().count == 1:
        return forward
    device = torch.device(settings.device)
    # Parameters are equal already, which Phases compares; a module without any that train cannot be wrapped.
    return DistributedDataParallel(forward, device_ids=None if device.type == "cpu" else [device], init_sync=False)


def clock_for(task: Task, settings: Settings) -> Clock:
    """The clock of a run on these data, its epochs undivided."""
    if settings.epochs is None:
        return replace(clock_of(None, settings.steps), per_epoch=_steps(task, settings))
    return clock_of(settings.epochs, _steps(task, settings))


def clock_of_run(run: Run, task: Task, settings: Settings) -> Clock:
    """The clock of this run. One that was begun before epochs were divided goes on in them."""
    clock, begun = clock_for(task, settings), [*run.history, *([run.record] if run.record is not None else [])]
    return clock if begun and begun[0].unit == "epoch" else clock.divided(run.schedule)


def _begin_data(run: Run, task: Task) -> None:
    """Where data and random numbers stand when training begins, or goes on by other processes than before."""
    processes, share = started(), task.train_share
    if processes.count > 1 and run.course is None:
        run.course = processes.from_one(0, lambda: random_state(devices=False), DynrankError, "beginning")
    share.course = task.eval_share.course = run.course
    if run.dealt not in (None, share.dealt) and run.dealt.endswith(share.unit):
        run.begun, run.drawn = run.passed, 0  # what others have left of the pass is dealt anew
        run.since = run.epoch + (run.step > 0)
    run.dealt = share.dealt


def _phases(run: Run, task: Task, settings: Settings, forward: nn.Module) -> Phases:
    """The schedule at work from where the run stands."""
    clock = clock_of_run(run, task, settings)
    phases = Phases(
        run.net if started().count == 1 else forward,
        run.optimizer,
        run.schedule,
        lr_scheduler=run.lr_scheduler,
        clock=clock,
        lr_every_step=run.lr_every_step,
        scaler=run.scaler,
        by_itself=False,
        settings=settings,
    )
    phases.history = [*run.history, *([run.record] if run.record is not None else [])]
    phases.load_hooks_state(run.hooks)
    _keep_place(run, phases)
    if run.lr_scheduler is not None and clock.scheduler_steps(clock.ticks, run.lr_every_step) is None:
        warnings.warn(
            f"train_data() does not say how many batches it has, so that no epoch ends after which "
            f'{type(run.lr_scheduler).__name__} is stepped: return it with "step" from lr_scheduler()',
            DynrankWarning,
            stacklevel=3,
        )
    return phases


def _keep_place(run: Run, phases: Phases) -> None:
    """Where a tick has become longer or shorter, since others train than those who began it: as far into it as then."""
    tick = (phases.clock.start(run.epoch), phases.clock.start(run.epoch + 1))
    if run.step and run.since > run.epoch and run.tick is not None and tick != run.tick:
        (begin, end), (old_begin, old_end) = tick, run.tick
        done = (phases.step - old_begin) / max(1, old_end - old_begin)
        phases.step = begin + min(int(done * (end - begin)), max(0, end - begin - 1))
    run.tick = tick


def _begin_epoch(run: Run, settings: Settings, phases: Phases) -> None:
    if len(run.history) > run.since and phases.clock.by_epochs:
        phases.clock = replace(phases.clock, every=_optimizer_steps(run.history[-1].steps, settings))
    phases.begin_tick(run.epoch)
    run.tick = (phases.clock.start(run.epoch), phases.clock.start(run.epoch + 1))
    run.record = phases.note(seconds=0.0)
    run.totals = torch.zeros(3, dtype=torch.float64, device=settings.device)
    _restart_peak(settings)


def _steps(task: Task, settings: Settings) -> int | None:
    """Optimizer steps of an epoch, as far as the data says and there are any."""
    return _optimizer_steps(task.train_share.length(0) or None, settings)


def _optimizer_steps(batches: int | None, settings: Settings) -> int | None:
    return None if batches is None else -(-batches // settings.accumulate)


def _train_epoch(
    run: Run,
    task: Task,
    settings: Settings,
    forward: nn.Module,
    batches: Iterator[Batch],
    save: Callable[[Run], None],
    watcher: Watcher,
    should_stop: Callable[[], int],
) -> bool:
    """To the end of the epoch, True, or to a stop. Between two optimizer steps nothing else is pending, so that a run
    is saved and left only there.
    """
    assert run.phases is not None
    processes, in_steps = started(), not run.phases.clock.by_epochs
    run.net.train()
    seconds = []
    pending = 0
    for batch in batches:
        began, length = time.perf_counter(), task.train_share.length()
        last = pending + 1 == settings.accumulate or run.drawn == length
        # Where nobody knows which batch is the last, each is averaged over the processes, which comes to the same.
        with _alone(forward) if length is not None and not last else nullcontext():
            loss, metric = _gradients(run, task, settings, forward, batch)
        run.step += 1
        pending += 1
        if last:
            _update(run, task, settings, pending)
            pending = 0
        # Where epochs of the data end within ticks; the end of a tick that is an epoch is in _finish_epoch.
        if in_steps and run.drawn == length and not isinstance(run.lr_scheduler, ReduceLROnPlateau):
            _step_scheduler(run, task)
        seconds.append(time.perf_counter() - began)
        watcher.step_done(run, loss, metric)
        if pending:
            continue
        if processes.most(should_stop()):
            return False
        if settings.checkpoint_steps and run.step // settings.accumulate % settings.checkpoint_steps == 0:
            _refuse_diverged(run)
            save(run)
    if pending:  # the last step of an epoch may have fewer batches, and the data may not say how many it has
        _update(run, task, settings, pending)
    run.note(step_seconds=statistics.median(seconds) if seconds else None)
    return True


def _alone(forward: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay with the process that they are of."""
    return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()


def _refuse_diverged(run: Run) -> None:
    """Before a checkpoint: what is not finite must not take the place of the last good one."""
    assert run.phases is not None
    what = _diverged(run) if math.isfinite(run.totals_of_all()[0]) else "the loss"
    if what is not None:
        raise DivergedError(
            f"the training diverged in epoch {run.epoch + 1}, where {what} is not finite: lower the learning rate; "
            "what was saved is from before that"
        )


def _diverged(run: Run) -> str | None:
    """What is not finite in any process: of a net in parts each sees its own."""
    assert run.phases is not None
    return next((what for what in started().gathered(run.phases.diverged()) if what is not None), None)


def _of_tick(run: Run, phases: Phases, endless: Iterator[Batch]) -> Iterator[Batch]:
    """Batches to the end of a tick, which does not wait for the end of a pass."""
    while phases.step < phases.clock.start(run.epoch + 1):
        yield next(endless)


def _passes(run: Run, task: Task) -> Iterator[Batch]:
    """The batches of one pass over the data after the other."""
    while True:
        yield from _one_pass(run, task)


def _one_pass(run: Run, task: Task) -> Iterator[Batch]:
    """The batches of a pass over the data; of one that was left midway, those that are still to come, drawn as if never
    interrupted.
    """
    share = task.train_share
    share.start, share.passes = run.begun, run.passes
    course = None if isinstance(share, OwnShare) else run.course
    if run.drawn == run.begun == 0:
        random = random_state(run.generators)
        run.epoch_start = random if course is None else {**course, "generators": random["generators"]}
        batches = batches_of(share, task, "train_data()")
    else:
        now = random_state(run.generators)
        assert run.epoch_start is not None
        set_random_state(run.epoch_start, run.generators)
        if course is not None:
            course.update(run.epoch_start | {"generators": []})
        batches = batches_of(share, task, "train_data()")
        if sum(1 for _ in itertools.islice(batches, run.drawn)) < run.drawn:
            raise DynrankError(
                f"train_data() gives fewer than the {counted(run.drawn, 'batch', 'batches')} of the epoch that were "
                "trained on"
            )
        set_random_state(now, run.generators)
    for batch in _while_all_have_one(batches, share.processes) if isinstance(share, OwnShare) else batches:
        run.drawn += 1
        run.passed = share.passed(run.drawn)
        yield batch
    without = [rank for rank, drawn in enumerate(share.processes.gathered(run.drawn + run.begun)) if drawn == 0]
    if without:
        where = f" for process {without[0]} of {share.processes.count}" if share.processes.count > 1 else ""
        raise DynrankError(
            f"train_data() gave no batch in epoch {run.epoch + 1}{where}: is drop_last set on a data set smaller than "
            "one batch, or is it a generator, which gives its batches once?"
        )
    run.drawn = run.begun = run.passed = 0
    run.passes += 1


def _while_all_have_one(batches: Iterator[Batch], processes: Processes) -> Iterator[Batch]:
    """Those of data that each process has its own of, until one has no more: then the others would wait for it."""
    while True:
        batch = next(batches, _END)
        if processes.most(batch is _END):
            return
        yield batch


def _gradients(
    run: Run, task: Task, settings: Settings, forward: nn.Module, batch: Batch
) -> tuple[Tensor, float | Tensor | None]:
    """Add the gradients of a batch to what is there."""
    output, batch = apply(forward, task, settings, batch)
    loss = loss_of(task, settings, output, batch)
    if not loss.requires_grad:
        raise DynrankError(
            "the loss must be one number that depends on the model's output: loss() gave one without a gradient"
        )
    with task.guard("the backward pass of loss()"):
        (loss if run.scaler is None else run.scaler.scale(loss)).backward()
    if all(p.grad is None for group in run.optimizer.param_groups for p in group["params"]):
        raise DynrankError(
            "the loss depends on nothing that the optimizer trains: compute it from the model's output, and give the "
            "optimizer the parameters that it is given"
        )
    with torch.no_grad():
        metric = metric_of(task, output, batch, loss)
        run.totals += torch.stack([loss.detach().double(), metric, torch.ones_like(loss).double()])
    return loss.detach(), metric if task.metric else None


def _update(run: Run, task: Task, settings: Settings, batches: int) -> None:
    """A step of the optimizer with the mean of the gradients of so many batches; none where float16 overflowed, which
    counts all the same.
    """
    phases = run.phases
    assert phases is not None
    step = phases.step + 1
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    trained = [p for group in run.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if batches > 1:
        torch._foreach_div_([p.grad for p in trained], batches)
    if settings.clip is not None:
        nn.utils.clip_grad_norm_(trained, settings.clip)
    with task.guard(f"the step of {type(run.optimizer).__name__}"):
        if run.scaler is None:
            run.optimizer.step()
        else:
            run.scaler.step(run.optimizer)
            run.scaler.update()
    if run.lr_scheduler is not None and run.lr_every_step:
        with _scheduling(run, task):
            run.lr_scheduler.step()
    phases.step = step
    run.optimizer.zero_grad()
    run.net.zero_grad()  # also of weights that the optimizer does not train: a switch refuses pending gradients


def _finish_epoch(run: Run, task: Task, settings: Settings, clock: Clock) -> None:
    loss, metric, batches = run.totals_of_all().tolist()
    run.note(steps=run.step, loss=loss / batches, metric=metric / batches if task.metric else None)
    _bring_buffers(run)
    ends = settings.epochs is None or clock.ends_epoch(run.epoch)
    if ends:  # an epoch of many ticks has one evaluation, as any other has
        run.note(**evaluate(run.net, task, settings))
    run.note(memory=_memory(run, settings))
    if settings.spectra:
        spectra = {name: modules[0].spectrum() for name, modules in switched_modules(run.net).items()}
        run.note(effective_rank={name: rounded(effective_rank(s), 5) for name, s in spectra.items()})
        run.note(stable_rank={name: rounded(stable_rank(s), 5) for name, s in spectra.items()})
    if clock.by_epochs or (isinstance(run.lr_scheduler, ReduceLROnPlateau) and (ends or clock.parts == 1)):
        _step_scheduler(run, task)
    if run.epoch + 1 == clock.ticks and task.eval_data is not None:
        run.note(truncated=_truncated(run, task, settings))
    add_(run.history, run.current)
    run.record, run.step, run.epoch = None, 0, run.epoch + 1


def _bring_buffers(run: Run) -> None:
    """To what they are in the first process, as DistributedDataParallel does it before every forward."""
    buffers = [buffer for buffer in run.net.buffers() if buffer.numel() and not is_part(buffer)]
    sent = started().from_one(0, lambda: buffers, DynrankError, "sending the buffers")
    for mine, its in zip(buffers, sent, strict=True):
        if mine is not its:
            mine.copy_(its)


def _scheduling(run: Run, task: Task) -> AbstractContextManager[object]:
    return task.guard(f"the step of {type(run.lr_scheduler).__name__}")


def _step_scheduler(run: Run, task: Task) -> None:
    """At the end of an epoch, or of a tick for one that waits for a plateau: it is told the held-out loss, where there
    is one.
    """
    if isinstance(run.lr_scheduler, ReduceLROnPlateau):
        loss = run.current.loss if run.current.eval_loss is None else run.current.eval_loss
        assert loss is not None
        with _scheduling(run, task):
            run.lr_scheduler.step(loss)
    elif run.lr_scheduler is not None and not run.lr_every_step:
        with _scheduling(run, task):
            run.lr_scheduler.step()


def _truncated(run: Run, task: Task, settings: Settings) -> dict[str, float | None]:
    """Loss and metric of the truncated model: those just measured, where every site is in LOW already."""
    if set(run.current.phases.values()) == {Phase.LOW}:
        return {"eval_loss": run.current.eval_loss, "eval_metric": run.current.eval_metric}
    if is_sharded(run.net):
        return tried(run.net, Phase.LOW, lambda: evaluate(run.net, task, settings))
    twin = a_twin(run.net)
    enter_(twin, Phase.LOW)
    return evaluate(inline_(twin), task, settings)


def _memory(run: Run, settings: Settings) -> dict[str, int]:
    """Bytes of parameters, buffers and optimizer state, and the peak of the epoch: of the device, or of the process."""
    tensors = [*run.net.parameters(), *run.net.buffers()]
    tensors += [t for state in run.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    device = torch.device(settings.device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"state": sum(own(t).nbytes for t in tensors), "peak": peak}


def _restart_peak(settings: Settings) -> None:
    if torch.device(settings.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
