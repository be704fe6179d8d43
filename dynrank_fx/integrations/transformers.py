"""A schedule of phases in a Hugging Face Trainer: ``Trainer(..., callbacks=[PhasesCallback(schedule)])``.

The Trainer's model is the net that ``transform`` made, or holds it. The state of the phases is in every checkpoint
folder, as ``phases.safetensors``. To go on from one, bring the net into its phases before the Trainer is made:
``resume_from_(net, folder)``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .. import files, store
from ..aliases import StateDict
from ..checks import checked_path
from ..errors import StoreError, TransitionError
from ..processes import is_part
from ..randomness import random_state, set_random_state
from ..rewrite import expect_factors_, switched_modules
from ..tracing import Net, meta_of
from ..training import Clock, Phases, clock_of, flatten, resume_phases_, unflatten
from .callback import PhasesHolder, net_in, read_pickled, refuse_engine

FILE = "phases.safetensors"
_OLD_FILE = "phases.pt"  # of earlier versions
_PREPARED = "dynrank_prepared"  # the attribute of a model that was
_INSTEAD = "DDP, which accelerate launch and torchrun start unless told otherwise"
_COUNT = "num_items_in_batch"  # of labels, over the batches of a step
_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # what the Trainer calls


class PhasesCallback(PhasesHolder, TrainerCallback):
    """Enters the phases of a schedule at every tick, optimizer state along.

    Several processes, which ``accelerate launch`` or ``torchrun`` starts, train as one does: by DDP, or by FSDP2 where
    it is asked for (``fsdp=True``).

    A tick is an epoch; where ``max_steps`` is given, or there is one epoch, it is a twentieth of the optimizer steps,
    and of up to five epochs a part where the schedule does not count epochs, as ``auto`` does not.

    The arguments are those of ``PhasesHolder``.

    Attributes:
        resume_from: The checkpoint folder that the Trainer goes on from, where it is not in its own output folder.

    Raises:
        TransitionError: When training begins, where the model holds no net of ``transform``, and for several devices or
            processes that train it by anything but DDP and FSDP2.
    """

    resume_from: str | Path | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # Any: the Trainer's own parts, each of a type of its own
    ) -> None:
        """Make the model one that the Trainer can save, and whose data keep their columns.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides: the model is used.
        """
        if kwargs["model"] is not None:  # the Trainer has no model_init
            self._prepare(kwargs["model"])

    def _prepare(self, model: nn.Module) -> None:
        """Only once, and when training begins, where the callback or the model came after the Trainer was made."""
        if getattr(model, _PREPARED, False):
            return
        setattr(model, _PREPARED, True)
        model.register_state_dict_post_hook(_clone_tied)
        _show_arguments(model)
        for part in model.modules():
            if isinstance(part, Net) and part is not model:
                part.register_forward_pre_hook(_without_count, with_kwargs=True)
        if isinstance(model, Net) and not any(hasattr(model, name) for name in _CHECKPOINTING):
            for name in _CHECKPOINTING:
                setattr(model, name, _refuse_checkpointing)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # Any: the Trainer's own parts, each of a type of its own
    ) -> None:
        """Begin: the optimizer and the scheduler exist, and a checkpoint has been restored.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides: the model, the optimizer and the scheduler are used.

        Raises:
            TransitionError: Where the model holds no net of ``transform``, a checkpoint lacks the state of the phases,
                or several devices or processes train in a way that phases do not go with.
            StoreError: Where that state is damaged, or of another checkpoint.
        """
        _refuse_engines(args)
        self._prepare(kwargs["model"])
        _refuse_unknown_columns(kwargs["model"], kwargs.get("train_dataloader"))
        optimizer, lr_scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        own = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps torch's, which has the hooks
        net, clock = net_in(kwargs["model"]), self._clock(args, state)
        if self.phases is not None:  # of an earlier train(), whose optimizer the Trainer goes on with
            _refuse_stale(net, own)
            self.end_earlier()
        self.phases = Phases(
            net,
            own,
            self.schedule,
            lr_scheduler=getattr(lr_scheduler, "scheduler", lr_scheduler),
            clock=clock,
            lr_every_step=True,
            by_itself=not clock.by_epochs,
            resume=self._saved(args, state) if state.global_step else None,
            averages=self.averages,
            scaler=getattr(optimizer, "scaler", None),
            settings=self.settings,
        )
        own.register_load_state_dict_pre_hook(lambda *_: _refuse_stale(net, own))
        # A checkpoint is to be gone on from; what is pushed, others load by from_pretrained.
        expect_factors_(kwargs["model"], not (args.push_to_hub and args.hub_strategy != "end"))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # Any: the Trainer's own parts, each of a type of its own
    ) -> None:
        """End: from now on ``save_pretrained``, and so ``save_model``, says when it writes factors.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides: the model is used.
        """
        expect_factors_(kwargs["model"], False)

    def _clock(self, args: TrainingArguments, state: TrainerState) -> Clock:
        """In epochs where they are given and several, in optimizer steps otherwise: a stream has no epochs."""
        if args.max_steps > 0:
            return clock_of(None, state.max_steps, self.every)
        epochs = math.ceil(state.num_train_epochs)
        clock = clock_of(epochs, max(1, math.ceil(state.max_steps / epochs)), self.every)
        divided = clock.divided(self.schedule)
        if divided is not clock and not float(args.num_train_epochs).is_integer():  # the last epoch is a shorter one
            return clock_of(None, state.max_steps)
        return divided

    def _saved(self, args: TrainingArguments, state: TrainerState) -> StateDict:
        """The state of the phases in the checkpoint that the Trainer goes on from."""
        folder = Path(self.resume_from or _checkpoint(args, state))
        found = _phases_in(folder)
        if found is None:
            raise TransitionError(
                f"{folder / FILE} is missing: give the callback the checkpoint that the Trainer resumes from as its "
                "resume_from"
            )
        saved, step = found
        if step not in (None, state.global_step):
            raise StoreError(
                f"{folder / FILE} is of step {step}, and the Trainer's checkpoint of step {state.global_step}: put "
                "back the file that belongs to it"
            )
        return saved

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Enter the phases of the epoch, where they go by epochs.

        Args:
            args: The TrainingArguments.
            state: The TrainerState, which tells the epoch.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides.

        Raises:
            TransitionError: As ``enter_`` does.
        """
        assert self.phases is not None
        if self.phases.is_due(epoch := int(state.epoch or 0)):
            self.phases.begin(epoch)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Write the state of the phases beside the Trainer's checkpoint.

        Args:
            args: The TrainingArguments.
            state: The TrainerState.
            control: The TrainerControl.
            **kwargs: What the Trainer tells besides.

        Raises:
            StoreError: Where the disk refuses.
        """
        folder = _checkpoint(args, state)
        if self.phases is None or not folder.is_dir():
            return
        tree, tensors = flatten(self.phases.state_dict(), "phases")  # in all processes, which may hold parts of it
        if args.should_save:
            store.write(folder / FILE, tensors, {"phases": tree, "step": state.global_step})


def _refuse_engines(args: TrainingArguments) -> None:
    """Raise TransitionError for several devices, or processes, that train in a way which phases do not go with."""
    if args.n_gpu > 1:
        raise TransitionError(
            f"the Trainer puts the model on {args.n_gpu} devices by DataParallel, which copies it for every batch: "
            "start a process for each device (accelerate launch, torchrun), or leave one by CUDA_VISIBLE_DEVICES"
        )
    engine = AcceleratorState().distributed_type
    if engine == DistributedType.DEEPSPEED:
        refuse_engine("DeepSpeed", f"leave it out of the TrainingArguments, and train by {_INSTEAD}")
    if engine == DistributedType.MEGATRON_LM:
        refuse_engine("Megatron-LM", f"train by {_INSTEAD}")
    if engine == DistributedType.FSDP and not AcceleratorState().is_fsdp2:
        refuse_engine("the first version of FSDP", f"ask for fsdp_version: 2, or train by {_INSTEAD}")


def _refuse_stale(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise TransitionError where weights of other phases have come into the net since its optimizer was made."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    sites = (modules[0] for modules in switched_modules(net).values())
    own = [parameter for site in sites for parameter in site.parameters(recurse=False) if parameter.requires_grad]
    if not all(id(parameter) in held for parameter in own):
        raise TransitionError(
            "weights of other phases were loaded into the net, and the Trainer's optimizer does not train them: set "
            "trainer.optimizer = None before it trains again, which makes a new one, or make the Trainer anew"
        )


def _refuse_checkpointing(**settings: object) -> None:
    """In the place of a method that a graph does not have. Raises TransitionError."""
    raise TransitionError(
        "gradient_checkpointing=True is for a method of the model that its graph does not have: transform with "
        "form=Form.LAYERS, which keeps the methods; or call model.gradient_checkpointing_enable() and model.train() "
        "before transform, which keeps the checkpoints, and leave it out of the TrainingArguments"
    )


def _without_count(
    part: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Before a captured part is called: the Trainer counts labels for models that take any keyword, which hand on what
    they do not use. A part that takes labels may compute the loss, for which the count is; then it is not dropped.
    """
    taken = inspect.signature(part.forward).parameters
    if "labels" not in taken and _COUNT not in taken:
        kwargs = {name: value for name, value in kwargs.items() if name != _COUNT}
    return args, kwargs


def _clone_tied(model: nn.Module, state: StateDict, prefix: str, metadata: object) -> None:
    """After ``state_dict()``: safetensors writes no two tensors of one memory, and the Trainer asks it to."""
    seen = set()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() and not is_part(value):  # parts are gathered before
            memory = value.untyped_storage().data_ptr()
            if memory in seen:
                state[name] = value.clone()
            seen.add(memory)


def _show_arguments(model: nn.Module) -> None:
    """Give the graph the signature of the model that it was made of: columns of the data that are none of its
    arguments are dropped by the Trainer, without a word.
    """
    names = meta_of(model).get("arguments", ()) if isinstance(model, Net) else ()
    if names:
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
        type(model).forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]


def _refuse_unknown_columns(model: nn.Module, loader: object) -> None:
    """Raise TransitionError for data that the model takes and its graph does not."""
    if not isinstance(model, Net):
        return
    vars(type(model).forward).pop("__signature__", None)
    taken, columns = inspect.signature(model.forward).parameters, _columns(getattr(loader, "dataset", None))
    lost = [name for name in meta_of(model).get("arguments", ()) if name in columns and name not in taken]
    if lost:
        raise TransitionError(
            f"the data have {', '.join(lost)}, which the model takes and its graph does not, since the example inputs "
            "were without: transform with them in example_inputs, or leave them out of the data"
        )


def _columns(data: object) -> Collection[str]:
    """The names of what a row of the data has, as far as they can be read without going through it."""
    named: Collection[str] | None = getattr(data, "column_names", None)
    if named is not None or isinstance(data, torch.utils.data.IterableDataset) or not isinstance(data, Sized):
        return named or ()
    before = random_state()
    first = data[0] if len(data) else ()  # type: ignore[index]
    set_random_state(before)
    return first if isinstance(first, Mapping) else ()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the Trainer's checkpoint at this step."""
    assert args.output_dir is not None, "the Trainer sets it"
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def resume_from_(net: nn.Module, folder: str | Path) -> None:
    """Bring a freshly transformed net into the phases of a checkpoint folder, before the Trainer is made.

    Args:
        net: What ``transform`` made.
        folder: The Trainer's checkpoint folder.

    Raises:
        TransitionError: For a folder without the state of the phases.
        StoreError: For one that is damaged or of something else.
        PlanError: For ranks that a site cannot have.
    """
    found = _phases_in(checked_path(folder))
    if found is None:
        raise TransitionError(f"{folder} has no {FILE}: it is of a training without phases")
    resume_phases_(net, found[0])


def _phases_in(folder: Path) -> tuple[StateDict, int | None] | None:
    """The state of the phases in a checkpoint folder, and its step, where it is known; None where there is none.

    Raises StoreError for a file that is damaged or of something else.
    """
    file = folder / FILE
    files.finish(file)
    if not file.exists():
        return (read_pickled(folder / _OLD_FILE), None) if (folder / _OLD_FILE).exists() else None
    tensors, info = store.read(file)
    if not isinstance(info, dict) or "phases" not in info:
        raise StoreError(f"{file} holds no phases: put back the file that was in the checkpoint")
    return unflatten(info["phases"], tensors), info.get("step")
