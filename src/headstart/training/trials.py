"""Tries what an arm will need of the Trainer, before anything costly has run."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend  # type: ignore[import-untyped]
from torch.utils.checkpoint import checkpoint

from headstart.system.errors import UserError
from headstart.training.arguments import optimizer_of, reason
from headstart.training.settings import Arm

MADE_OF_LAYERS = ("galore", "apollo", "lomo", "adalomo")
"""Optimizers that cannot be tried before there is a student."""


def check_arguments(arm: Arm, arguments: Any) -> None:
    """Find out what the Trainer would only say when an arm is about to train, that is after the
    search.

    Raises:
        UserError: as `check_sharding`; or a package is not installed, the hub does not know the
            user, or optimizer, schedule or checkpointing cannot be made.
    """
    check_sharding(arguments)
    _check_packages(arguments)
    _check_login(arguments)
    _check_checkpointing(arguments)
    _check_optimizer(arm, arguments)


def _check_packages(arguments: Any) -> None:
    """Raise a UserError if a logger, a compiler or kernels are asked for that are not there."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.utils import is_liger_kernel_available

    # Whether Flyte or Azure is there, only using it can tell.
    loggers = {*get_available_reporting_integrations(), "flyte", "azure_ml"}
    for name in arguments.report_to:
        if name not in loggers:
            raise UserError(
                f"train.report_to names {name!r}, which is unknown or not installed; install it, "
                f"or choose none or some of {', '.join(sorted(loggers))}"
            )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "train.use_liger_kernel needs a package: pip install liger-kernel, or remove it"
        )
    backend, mode = arguments.torch_compile_backend, arguments.torch_compile_mode
    if backend and str(backend).upper() not in DynamoBackend.list():
        raise UserError(
            f"train.torch_compile_backend is {backend!r}; choose one of "
            f"{', '.join(map(str.lower, DynamoBackend.list()))}"
        )
    if backend == "inductor" and mode:
        modes = {"default", *torch._inductor.list_mode_options()}
        if mode not in modes:
            raise UserError(
                f"train.torch_compile_mode is {mode!r}; choose one of {', '.join(sorted(modes))}"
            )


def _check_login(arguments: Any) -> None:
    """Raise a UserError if checkpoints shall go to a hub that does not know the user."""
    if not arguments.push_to_hub:
        return
    from huggingface_hub import whoami

    try:
        whoami(token=arguments.hub_token)
    except Exception as error:
        raise UserError(
            f"train.push_to_hub needs a login to the hub ({reason(error)}); run `hf auth login`, "
            "or remove it"
        ) from error


def _check_checkpointing(arguments: Any) -> None:
    """Raise a UserError if activations cannot be checkpointed so, tried on one number."""
    settings = {"use_reentrant": False, **(arguments.gradient_checkpointing_kwargs or {})}
    for of_the_trainer in ("every_n_layers", "offload"):
        settings.pop(of_the_trainer, None)
    try:
        checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **settings)
    except Exception as error:
        raise UserError(
            f"train.gradient_checkpointing_kwargs {settings} cannot be used ({reason(error)}); "
            "mend it"
        ) from error


def _check_optimizer(arm: Arm, arguments: Any) -> None:
    """Raise a UserError if an arm's optimizer or schedule cannot be made, tried on one weight."""
    from transformers import Trainer, get_scheduler

    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer: Any = torch.optim.SGD(weights)
    name = str(getattr(arguments.optim, "value", arguments.optim))
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    kind: Any = torch.optim.AdamW
    settings = {"betas": betas, "eps": arguments.adam_epsilon}
    own = optimizer_of(arm, arguments)
    try:
        if own is None:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind(weights, **settings)
    except Exception as error:
        if not name.startswith(MADE_OF_LAYERS) or isinstance(error, ImportError):
            raise UserError(
                f"train.optim {name} cannot be made ({reason(error)}); mend it or its arguments"
            ) from error
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    try:
        get_scheduler(schedule, optimizer, 1, 2, arguments.lr_scheduler_kwargs)
    except Exception as error:
        raise UserError(
            f"train.lr_scheduler_type {schedule} cannot be made ({reason(error)}); mend it or "
            "train.lr_scheduler_kwargs"
        ) from error


def check_sharding(arguments: Any) -> None:
    """Raise a UserError if one process sees several GPUs; if FSDP is asked for where accelerate
    would silently do without; or DeepSpeed in a way that leaves no process with the output matrix,
    which losses need."""
    kind = arguments.distributed_state.distributed_type
    if arguments.n_gpu > 1:
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process, which would share its batches by "
            f"DataParallel; start `torchrun --nproc-per-node {arguments.n_gpu} -m headstart.cli "
            "...`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if arguments.fsdp and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UserError(
            "train.fsdp needs several GPUs: accelerate passes over it on CPUs and in a single "
            "process, which would hold the whole model; remove it or start with torchrun"
        )
    if arguments.deepspeed and arguments.hf_deepspeed_config.is_zero3():
        raise UserError(
            "train.deepspeed has ZeRO stage 3, which splits the output matrix that losses are "
            "computed with; use stage 1 or 2, or train.fsdp"
        )
