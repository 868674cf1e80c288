"""A transformers.Trainer that distils, evaluates at chosen steps, and resumes after a kill."""

from __future__ import annotations

import json
import math
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from headstart.losses.distillation import (
    DistillationSettings,
    Samples,
    TopK,
    summed_distillation_loss,
)
from headstart.losses.gradients import cross_entropy_and_gradient, distillation_and_gradient
from headstart.losses.next_token import next_token_loss
from headstart.model.checkpoint import copy_files
from headstart.model.transformers_4 import add_old_keys
from headstart.system.distributed import barrier
from headstart.system.files import UNFINISHED, apply_umask
from headstart.system.progress import console
from headstart.text.blocks import BlockDataset
from headstart.training.cache import outputs_of_batch
from headstart.training.teacher import Teacher


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trains on text, and on a teacher's outputs if one is given.

    The loss comes from the last hidden states, chunk by chunk, so that no logits tensor of the
    whole batch exists. Evaluation is always plain cross-entropy.

    Args:
        teacher: learnt from when `distillation` is set; None where batches hold its outputs.
        distillation: weights and divergence; None trains on text alone.
        shared_rows: tokens that teacher and student are compared on, the first ones; 0 for all.
        test_dataset: on which the model is measured before the first step and after the last, if
            it is given.
        tokens_per_step: by which the weights' schedule counts.
        evaluation_steps: the optimizer steps after which to evaluate.
        tokenizer_folder: whose tokenizer is saved beside the weights, if any.
        earlier_seconds: that the run had trained before it was resumed.
        flops_per_token: of a training step, for the share of `peak_flops` that is reached.
        peak_flops: a second, of one device; None where unknown.
        on_step: called after each optimizer step with (steps done, note).
        **arguments: of transformers.Trainer.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        teacher: Teacher | None,
        distillation: DistillationSettings | None,
        shared_rows: int = 0,
        test_dataset: BlockDataset | None = None,
        tokens_per_step: int,
        evaluation_steps: set[int],
        tokenizer_folder: Path | None = None,
        earlier_seconds: float = 0.0,
        flops_per_token: float = 0.0,
        peak_flops: float | None = None,
        on_step: Callable[[int, str], None] = lambda steps, note: None,
        **arguments: Any,
    ) -> None:
        assert teacher is None or distillation is not None
        uses_cache = arguments["model"].config.use_cache
        super().__init__(**arguments)
        # The Trainer says no for training, whose calls say so here; it would be saved.
        self.model.config.use_cache = uses_cache
        self.teacher, self.distillation = teacher, distillation
        self.shared_rows = shared_rows or None
        self.test_dataset = test_dataset
        self.tokenizer_folder = tokenizer_folder
        self.tokens_per_step = tokens_per_step
        self.started = time.perf_counter() - earlier_seconds
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.hidden: list[Tensor] = []
        """What the model's forward pass ended in, until it is taken."""
        hidden = self.hidden  # a hook that knew the trainer would keep the model with it
        self.model.base_model.register_forward_hook(
            lambda model, inputs, outputs: hidden.append(outputs.last_hidden_state)
        )
        self.cross_entropy = self._compiled(cross_entropy_and_gradient)
        self.distillation_loss = self._compiled(distillation_and_gradient)
        self.sums = torch.zeros(3, device=self.args.device)
        """Of cross-entropy, weighted divergence and tokens, since they were last logged."""
        self.logged_step, self.logged_at = -1, 0.0
        self.pause_seconds = 0.0
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(EvaluateAt(evaluation_steps))
        self.add_callback(ReportStep(on_step))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(
            self.train_dataset if train_dataset is None else train_dataset
        )  # which is in order

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        blocks = inputs["input_ids"]
        hidden, matrix = self._hidden_and_matrix(model, inputs)
        distillation = self.distillation if model.training else None
        alpha, beta = distillation.weights(self._tokens_seen) if distillation else (1.0, 0.0)
        # The model's own forward pass has its precision from accelerate; this is outside of it.
        with self.accelerator.autocast():
            if beta > 0:
                total = self._distil(hidden, matrix, inputs)
            else:
                hard = next_token_loss(hidden, matrix, blocks, self.cross_entropy)
                if distillation:
                    self._add_up(hard)
                total = alpha * hard
        num_targets = blocks.shape[0] * (blocks.shape[1] - 1)
        if distillation:
            self.sums[2] += num_targets
        if num_items_in_batch is None:
            # Nobody else divides by the steps that are accumulated, see `loss_is_scaled_for_ga`.
            steps = self.args.gradient_accumulation_steps if model.training else 1
            loss = total / (num_targets * steps)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss with every block counted once, its logits as precise as the weights.

        The Trainer's own loop counts some blocks twice where they do not divide among processes.
        """
        start = time.perf_counter()
        self.model.eval()
        losses = []
        for inputs in dataloader:
            batch = self._prepare_inputs(inputs)
            blocks = batch["input_ids"]
            with torch.no_grad():
                hidden, matrix = self._hidden_and_matrix(self.model, batch)
                totals = [
                    next_token_loss(hidden[[i]], matrix, blocks[[i]]) for i in range(len(blocks))
                ]
            losses.append(self.accelerator.gather_for_metrics(torch.stack(totals)))
        per_block = torch.cat(losses).double() / (blocks.shape[1] - 1)
        metrics = {f"{metric_key_prefix}_loss": per_block.mean().item()}
        if metric_key_prefix == "test":
            error = per_block.std(correction=0).item() / math.sqrt(max(1, len(per_block) - 1))
            metrics["test_standard_error"] = error
        self.pause_seconds += time.perf_counter() - start
        return EvalLoopOutput(None, None, metrics, len(per_block))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and keep the weights if no evaluation has been better, the first one excepted.

        They are in `best-STEP`, an ordinary checkpoint folder without the optimizer's state. Before
        the first step and after the last, the test split is measured too, and chooses nothing.
        """
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.test_dataset and self.state.global_step in (0, self.state.max_steps):
            # Not the loader of evaluations, which persistent workers would keep for validation.
            loader = self.get_test_dataloader(self.test_dataset)
            self.log(self.evaluation_loop(loader, "test", metric_key_prefix="test").metrics)
        history = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        if self.state.global_step and metrics["eval_loss"] < min(history[:-1], default=0.0):
            start = time.perf_counter()
            folder = Path(self.args.output_dir)
            unfinished = folder / f"{UNFINISHED}best-{self.state.global_step}"
            self.save_model(str(unfinished), _internal_call=True)
            if self.is_world_process_zero():
                earlier = list(folder.glob("best-*"))
                kept = folder / f"best-{self.state.global_step}"
                if kept not in earlier:  # else killed just after it, and trained to it again
                    unfinished.rename(kept)
                for path in {unfinished, *earlier} - {kept}:
                    shutil.rmtree(path, ignore_errors=True)
            self.pause_seconds += time.perf_counter() - start
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save without the second copy of a tied matrix that FSDP's gathered weights have, with a
        config that transformers 4 reads too, and with the teacher's own tokenizer files, which
        saved anew would be those of transformers 5 alone.

        Checkpoints have neither, since the Trainer reads their configs with a warning of old keys.
        """
        if state_dict is not None and self.model.config.tie_word_embeddings:
            tied = self.accelerator.unwrap_model(self.model)._tied_weights_keys or {}
            state_dict = {name: state_dict[name] for name in state_dict if name not in tied}
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            add_old_keys(folder)
            if self.tokenizer_folder is not None:
                copy_files(self.tokenizer_folder, folder)
            apply_umask(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save, and wait for the others: what is written next says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        barrier()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with speed and parts of the loss, and with the seconds trained so far, which a
        resumed run reads from its checkpoint."""
        if "loss" in logs:
            logs = {**logs, **self._parts(), **self._speed()}
        super().log({**logs, "seconds": self.seconds}, *args, **kwargs)

    def _parts(self) -> dict[str, float]:
        if self.distillation is None:
            return {}
        hard, soft, tokens = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        self.sums.zero_()
        return {"ce": hard / tokens, "kd": soft / tokens}

    def _speed(self) -> dict[str, float]:
        """Tokens a second since the last call, and the share of the hardware's peak they took."""
        now = time.perf_counter()
        steps = self.state.global_step - self.logged_step
        seconds = now - self.logged_at - self.pause_seconds
        is_first = self.logged_step < 0
        self.logged_step, self.logged_at, self.pause_seconds = self.state.global_step, now, 0.0
        if is_first or seconds <= 0:
            return {}
        rate = steps * self.tokens_per_step / seconds
        speed = {"tokens_per_second": rate}
        if self.peak_flops:
            peak = self.peak_flops * self.accelerator.num_processes
            speed["mfu"] = rate * self.flops_per_token / peak
        return speed

    def _add_up(self, hard: Tensor, soft: Tensor | None = None) -> None:
        """Remember the parts of a training loss, on the device, so that nothing waits for it."""
        self.sums[0] += hard.detach().sum()
        if soft is not None:
            self.sums[1] += soft.detach().sum()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def _hidden_and_matrix(
        self, model: nn.Module, inputs: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Final hidden states, and the matrix that turns them into logits."""
        # Through the wrapped model, so that DDP sees the call; one position's logits are
        # the fewest that it can be asked for.
        model(
            input_ids=inputs["input_ids"],
            position_ids=inputs.get("position_ids"),
            logits_to_keep=1,
            use_cache=False,
        )
        matrix = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        # FSDP2 keeps the root's parameters whole from its forward pass to its backward pass.
        assert not isinstance(matrix, DTensor)
        hidden = self.hidden[-1]
        self.hidden.clear()
        return hidden, matrix

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, compiled as the model is."""
        if not self.args.torch_compile:
            return function
        backend, mode = self.args.torch_compile_backend, self.args.torch_compile_mode
        compiled: Callable[..., Any] = torch.compile(function, backend=backend, mode=mode)
        return compiled

    @property
    def _tokens_seen(self) -> int:
        return int(self.state.global_step * self.tokens_per_step)

    def _distil(self, hidden: Tensor, matrix: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        settings, blocks = self.distillation, inputs["input_ids"]
        assert settings is not None
        return summed_distillation_loss(
            hidden[:, :-1].flatten(0, 1),
            matrix,
            blocks[:, 1:].flatten(),
            self._teacher_outputs(inputs),
            settings,
            tokens_seen=self._tokens_seen,
            on_parts=self._add_up,
            loss_and_gradient=self.distillation_loss,
            shared_rows=self.shared_rows,
        )

    def _teacher_outputs(
        self, inputs: dict[str, Tensor]
    ) -> Callable[[slice], Tensor | TopK | Samples]:
        """What the teacher says of a slice of a batch's tokens, from the batch if it is there."""
        teacher = self.teacher
        if teacher is not None:
            hidden = teacher.hidden(inputs["input_ids"], inputs.get("position_ids"))
            hidden = hidden[:, :-1].flatten(0, 1)
            return lambda chunk: teacher.logits(hidden[chunk])
        kept = outputs_of_batch(inputs)
        return lambda chunk: type(kept)(*(values[chunk] for values in kept))


class EvaluateAt(TrainerCallback):  # type: ignore[misc]
    """Evaluates after chosen steps; TrainingArguments knows only even spacing."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in self.steps


NOTES = {
    "eval_loss": "validation {:.3f}",
    "loss": "train {:.3f}",
    "ce": "ce {:.3f}",
    "kd": "kd {:.3f}",
    "mfu": "MFU {:.0%}",
}
"""What the progress bar says of each thing that is logged."""


class ReportStep(TrainerCallback):  # type: ignore[misc]
    """Passes steps done and the latest losses on to a progress bar."""

    def __init__(self, on_step: Callable[[int, str], None]) -> None:
        self.on_step = on_step
        self.losses: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for key, form in NOTES.items():
            if key in (logs or {}):
                self.losses[key] = form.format(logs[key])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step(state.global_step, " ".join(self.losses.values()))


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; cut-off ones are removed.

    The Trainer writes a checkpoint's `trainer_state.json` after everything else in it.
    """
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for checkpoint in reversed(checkpoints):
        if _is_whole(checkpoint):
            return checkpoint
        console.print(
            f"{checkpoint} was cut off while it was written or copied, and is removed; training "
            "goes on from the checkpoint before it, or from the start"
        )
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):  # which compares the file's size
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # torch.save writes archives, whose index is at the end.
    return all(zipfile.is_zipfile(state) for state in checkpoint.glob("*.pt*"))


def is_evaluated(checkpoint: Path | None, step: int) -> bool:
    """Whether a run was evaluated after a step, as a checkpoint of that step knows.

    One that a signal has stopped was not.
    """
    if checkpoint is None:
        return False
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return any("eval_loss" in entry and entry["step"] == step for entry in history)


def seconds_until(checkpoint: Path | None) -> float:
    """The seconds that a run had trained when it last logged before a checkpoint."""
    if checkpoint is None:
        return 0.0
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return max((entry.get("seconds", 0.0) for entry in history), default=0.0)


def evaluation_steps(num_steps: int, num_evaluations: int) -> list[int]:
    """Steps after which to evaluate: denser at the start, where loss falls fastest.

    Quadratic spacing from the first step to the last, without step 0.

    >>> evaluation_steps(100, 5)
    [4, 16, 36, 64, 100]
    """
    spaced = (round(num_steps * (k / num_evaluations) ** 2) for k in range(1, num_evaluations + 1))
    return sorted({max(1, step) for step in spaced})
