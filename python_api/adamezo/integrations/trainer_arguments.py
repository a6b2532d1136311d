"""What ZOTrainer refuses of a Trainer's arguments, with the reason."""

from __future__ import annotations

import os
from typing import Any

from ..engine.optimizer import ZerothOrder
from ..engine.sharded import is_sharded
from ..methods import HELENE, AdaMeZO

FP16 = (
    "fp16=True scales a loss for its gradients, and there are none: torch's GradScaler refuses "
    "steps with a closure. Leave it out and load the model in float16, take bf16=True, or set "
    "bf16_full_eval for evaluations alone"
)


def check(trainer: Any, has_objective: bool, train_mode: bool) -> bool:
    """Raises TypeError or ValueError for arguments that forward-only steps cannot serve.

    Returns:
        Whether the optimizer draws labels, as HELENE with ``curvature="sampled"`` does.
    """
    args = trainer.args
    kind: type
    options: dict[str, Any]
    kind, options = trainer.optimizer_cls_and_kwargs or (AdaMeZO, {})
    given = type(trainer.optimizer) if trainer.optimizer is not None else kind
    if not issubclass(given, ZerothOrder):
        raise TypeError(
            f"the optimizer is {given.__name__}, which needs gradients; expected one of this "
            "package, such as AdaMeZO or MeZO. Take transformers.Trainer for it"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if not optim.startswith("adamw_torch"):  # the default, which nobody asked for
        raise ValueError(
            f"optim={optim!r} names an optimizer that needs gradients: leave it out and "
            "pass optimizer_cls_and_kwargs=(AdaMeZO, {...})"
        )
    accelerator = trainer.accelerator
    if accelerator.mixed_precision == "fp16":  # of `accelerate launch`, which args do not say
        raise ValueError(FP16)
    several = accelerator.num_processes > 1
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and not several:
        raise ValueError(
            f"{started} processes were started, and accelerate takes each for the only one, as "
            "it does where it finds no GPU: pass use_cpu=True to the TrainingArguments, or "
            "unset WORLD_SIZE"
        )
    launched = str(accelerator.distributed_type.value)
    whole = ("NO", "MULTI_CPU", "MULTI_GPU") if several else ("NO", "TP")
    divided = several and (
        getattr(accelerator, "parallelism_config", None) is not None
        or any(map(is_sharded, trainer.model.parameters()))
    )
    if launched not in whole or divided:
        raise ValueError(
            f"got {accelerator.num_processes} processes of the kind {launched}"
            f"{' and a model in pieces' * divided}: expected processes that each have the "
            "whole model, as torchrun and accelerate launch start them without FSDP, DeepSpeed "
            "or a parallelism_config. For a model in pieces write the loop yourself, with "
            "fully_shard and adamezo.distributed.connect"
        )
    if several and not args.accelerator_config.even_batches and not args.dataloader_drop_last:
        raise ValueError(
            "even_batches=False gives some processes fewer batches, and the others would wait "
            "for them in the last step: leave it out, or set dataloader_drop_last=True"
        )
    if trainer.optimizer is not None:
        options = trainer.optimizer.param_groups[0]
    samples: bool = issubclass(given, HELENE) and options.get("curvature") == "sampled"
    of_ones_own = getattr(trainer, "compute_loss_func", None) is not None
    if samples and (args.label_smoothing_factor or of_ones_own or has_objective):
        what = "compute_loss_func" if of_ones_own else "label_smoothing_factor"
        raise ValueError(
            "curvature='sampled' needs the likelihood that labels are drawn from as the loss, "
            f"and {'an objective' if has_objective else what} makes it another one: leave it "
            "out, or take curvature='loss'"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"got {args.n_gpu} GPUs, over which the Trainer spreads a batch by DataParallel: "
            "that was not tested with perturbed weights. Set CUDA_VISIBLE_DEVICES to one"
        )
    if args.neftune_noise_alpha is not None and not train_mode:
        raise ValueError(
            "neftune_noise_alpha adds noise in train mode alone: pass train_mode=True, or "
            "leave it out"
        )
    return samples
